"""Extraction by real processes: killed, resumed, several at once, on one machine and on two."""

import json
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import webdataset as wds
from extract_runs import ROOT, command, extract, make_pictures, noise, same
from picture_bytes import encoded

from cleandift_backbones.cli.extract import main
from cleandift_backbones.features import Features

MANY, SLOW = 60, 0.2
OPTIONS = ["--batch-size", "2", "--shard-items", "4", "--keep-size", "--map", "us6", "mid"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("data") / "photos", MANY)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The features of an uninterrupted run of one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    extract(data, out, *OPTIONS)
    return out


def finished(process, code=0):
    said = process.communicate(timeout=300)
    assert process.returncode == code, said[1][-3000:]
    return said


def when_shards(out, count, process, rank="*"):
    """Waits until there are so many shards, of one process or of all."""
    for _ in range(3000):
        if len(list(out.glob(f"features-{rank}-*.safetensors"))) >= count:
            return
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.02)
    raise AssertionError("no shards")


def kill(process):
    """The process and all that it started, at once and without a word."""
    mine = psutil.Process(process.pid)
    for one in [mine, *mine.children(recursive=True)]:  # torchrun's are in sessions of their own
        one.kill()
    process.communicate()


def only_whole_shards(out):
    features = Features(out)
    assert 0 < len(features) < MANY
    for one in features:
        assert one["us6"].isfinite().all()
    return len(features)


def test_a_killed_run_goes_on(data, whole, tmp_path, capsys):
    out = tmp_path / "out"
    first = command(data, out, *OPTIONS, workers=2, slow=SLOW)
    when_shards(out, 3, first)
    kill(first)
    there = only_whole_shards(out)
    assert extract(data, out, *OPTIONS).pictures == MANY - there
    assert f"{there} of {MANY} images are in" in capsys.readouterr().out
    same(out, whole)
    keys = [key for shard in sorted(out.glob("features-*")) for key in _keys(shard)]
    assert len(keys) == len(set(keys)) == MANY  # nothing was computed twice
    assert not list(out.glob(".*.part"))


def _keys(shard):
    from cleandift_backbones.features.formats import Safetensors

    return [row["key"] for row in Safetensors(shard).rows()]


@pytest.mark.slow
@pytest.mark.parametrize("stop, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_stores_what_it_has(data, whole, tmp_path, stop, code):
    out = tmp_path / "out"
    calls = tmp_path / "calls"
    process = command(data, out, *OPTIONS, "--shard-items", "20", workers=1, slow=SLOW, calls=calls)
    while not calls.exists() or calls.stat().st_size < 14:  # of 10 batches a shard: some of the second are done
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.02)
    process.send_signal(stop)
    _, said = finished(process, code)
    assert "stopped; what was computed is stored" in said and not list(out.glob(".*.part"))
    assert only_whole_shards(out) not in (20, 40)
    extract(data, out, *OPTIONS)
    same(out, whole)


def test_full_disk_leaves_nothing_half_written(data, tmp_path, capsys):
    """The operating system refuses to write more than 50 kB to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for format in ("safetensors", "parquet"):
        out = tmp_path / format
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
            with pytest.raises(SystemExit) as stop:
                extract(data, out, "--size", "256", "--format", format)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        said = capsys.readouterr().err
        assert stop.value.code == 2 and "did not take a file of" in said and "Is the disk full?" in said
        assert sorted(path.name for path in out.iterdir()) == ["meta.json"]


@pytest.mark.slow
def test_two_processes_of_torchrun(data, whole, tmp_path):
    """Killed in the middle, and gone on with by one process, by three, and by none: nothing is left to do."""
    out = tmp_path / "out"
    two = [*TORCHRUN, "--standalone", "--nproc-per-node=2"]
    first = command(data, out, *OPTIONS, launcher=two, slow=SLOW)
    for rank in ("00000", "00001"):
        when_shards(out, 1, first, rank)
    kill(first)
    there = only_whole_shards(out)
    assert len({path.name.split("-")[1] for path in out.glob("features-*")}) == 2  # both wrote shards of their own
    said, _ = finished(command(data, out, *OPTIONS, launcher=[*TORCHRUN, "--standalone", "--nproc-per-node=3"]))
    assert f"holds the features of {MANY} images" in said and "process 2 of 3" in said
    same(out, whole)
    assert extract(data, out, *OPTIONS).pictures == 0 and there > 0
    index = [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]
    assert [row["key"] for row in index] == Features(whole).keys


@pytest.mark.slow
def test_accelerate_launch(data, whole, tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1"]
    finished(command(data, tmp_path / "out", *OPTIONS, launcher=[*launcher, "--mixed_precision=no"]))
    same(tmp_path / "out", whole)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["torchrun", "parts"])
def test_two_machines(data, whole, tmp_path, how):
    """Two launchers on one folder. One machine dies; the other finishes its part; a third start does the rest."""
    out = tmp_path / "out"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def machine(number, slow=0):
        if how == "parts":
            return command(data, out, *OPTIONS, "--part", f"{number}/2", slow=slow)
        common = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
        return command(data, out, *OPTIONS, launcher=[*TORCHRUN, *common, f"--node-rank={number}"], slow=slow)

    machines = [machine(0, SLOW), machine(1, SLOW)]
    when_shards(out, 3, machines[0])
    kill(machines[1])
    if how == "parts":
        said, _ = finished(machines[0])
        assert "are not there yet: other processes have them" in said
    else:  # its launcher waits for the other's, which does not concern the features
        for _ in range(3000):
            if (out / "index.jsonl").is_file():
                break
            time.sleep(0.02)
        kill(machines[0])
    there = only_whole_shards(out)
    assert there >= MANY // 2
    machines = [machine(0), machine(1)]
    for process in machines:
        finished(process)
    same(out, whole)


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others(tmp_path):
    """A broken picture stops the process that meets it (--strict); the launcher ends the other one, which stores."""
    data = make_pictures(tmp_path / "data", 60)
    (data / "one/03.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    clock = time.monotonic()
    run = command(data, out, *OPTIONS, "--strict", launcher=[*TORCHRUN, "--standalone", "--nproc-per-node=2"])
    _, said = finished(run, 1)
    assert "03.png: not an image in a supported format" in said and time.monotonic() - clock < 120
    extract(data, out, *OPTIONS)
    assert len(Features(out)) == 59


@pytest.mark.slow
def test_the_page_of_the_documentation(tmp_path, monkeypatch, capsys):
    """Its commands and its code, all of them, in order."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    make_pictures(tmp_path / "photos", 6)
    noise(7, 200, 150).save("photos/cat.jpg")
    (tmp_path / "shards").mkdir()
    for number in range(2):
        with wds.TarWriter(f"shards/{number:04}.tar") as writer:
            writer.write({"__key__": f"{number}", "jpg": encoded(noise(number, 90, 70), "JPEG")})
    (tmp_path / "list.jsonl").write_text('{"path": "photos/cat.jpg", "key": "cat"}\n{"path": "photos/one/01.png"}\n')
    page = (ROOT / "docs/extract.md").read_text()
    ran = 0
    for language, block in re.findall(r"```(bash|python)\n(.*?)```", page, re.S):
        if language == "python":
            exec(block, scope := {})
            assert scope["features"]["cat.jpg"]["us6"].shape == (112, 16, 16)
            continue
        for words in map(shlex.split, block.strip().splitlines()):
            if "data/emoji/heldout" in words:
                continue  # the pictures of the measurement
            if words[:2] == ["cleandift", "extract"]:
                main([*words[2:], "--workers", "0"])
            else:
                run = subprocess.run([f"{Path(sys.executable).parent}/{words[0]}", *words[1:]], capture_output=True)
                assert run.returncode == 0, run.stderr.decode()[-3000:]
            ran += 1
    assert ran >= 9
    assert Features("vectors").stack("mid").shape == (2, 112)
    sizes = Features("sizes")
    assert sizes.keys == ["cat", "photos/one/01.png"] and sizes["cat"]["input"] == [160, 192]
    assert len(Features("many")) == len(Features("noisy")) == 7
