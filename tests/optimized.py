"""What the tests of optimize() share: small models, images, how far maps are apart, what is held and counted."""

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

ALL = tuple(range(11))


def build(name="test_cleandift", **kwargs):
    torch.manual_seed(0)
    kwargs = kwargs or dict(features_only=True, out_indices=ALL)
    return timm.create_model(name, **kwargs).eval()


def images(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def apart(found, expected):
    """Largest difference of maps, relative to their norms."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def held(model):
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def gflop(model, x):
    """Of one pass, by torch's counter, and of the CPU's fused attention, which it leaves out."""

    def attention(query, key, value, *_, **__):
        return sdpa_flop_count(query, key, value)

    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() / 1e9
