"""Arguments of create_model of a wrong type or value: one error of the package, which names argument and value."""

import numpy as np
import pytest
import timm
import torch

from cleandift_backbones.utils.errors import CleanDIFTError


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(timestep="261"), "timestep must lie in 0..999, got '261': give one number"),
        (dict(timestep=[5, 6]), r"timestep must lie in 0..999, got \[5, 6\]"),
        (dict(timestep=torch.tensor([5, 6])), "timestep must lie in 0..999, got tensor"),
        (dict(projected_timestep="x"), "projected_timestep must lie in 0..999, got 'x'"),
        (dict(in_chans="3"), "whole numbers, got '3' and 0"),
        (dict(in_chans=3.0), "whole numbers, got 3.0 and 0"),
        (dict(num_classes="10"), "whole numbers, got 3 and '10'"),
        (dict(global_pool="token"), "global_pool='token' is none of timm's poolings"),
        (dict(drop_path_rate=0.1), "'drop_path_rate' is no argument of test_cleandift: leave it out"),
        (dict(ensemble_size=2), "'ensemble_size' is no argument of test_cleandift"),
        (dict(features_only=True, img_size=64), "'img_size' is no argument of test_cleandift"),
        (dict(features_only=True, out_indices=()), "no map is asked for. This model has 0 = us10"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(CleanDIFTError, match=message):
        timm.create_model("test_cleandift", **arguments)


@pytest.mark.parametrize("value", [5, 5.0, torch.tensor(5), torch.tensor([5.0]), np.float32(5), np.int64(5)])
def test_numbers_of_other_types(value, recwarn):
    assert timm.create_model("test_cleandift", timestep=value).timestep == 5
    assert not [warning for warning in recwarn if "copy construct" in str(warning.message)]
