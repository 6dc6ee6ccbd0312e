"""Initial values of a convolutional backbone, keyed by name.

The rule is that of the RegNet which SEER trained (ClassyVision `anynet.py`, `regnet.py`; VISSL `regnet_fsdp.py`).
timm's differs: it divides the fan by the groups and starts the last BatchNorm of every block at zero.
"""

import math

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from seer.keyed_tensors import normal_, uniform_


def initialise(network: nn.Module, *, seed: int = 0) -> None:
    """Sets every parameter and buffer of a backbone, also after `to_empty`.

    Convolutions, those of squeeze-and-excitation and grouped ones included: N(0, 2 / (kernel area x all output
    channels)), biases U(+-1/sqrt(fan in)). BatchNorm: weight 1, bias 0, running mean 0, running variance 1, counter 0.

    Args:
        network: convolutions and BatchNorm; it must not be on the meta device.
        seed: the values are a function of it and of the parameters' names relative to `network`.

    Raises:
        TypeError: a module with parameters or buffers of its own for which there is no rule.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            _initialise_convolution(module, seed, name)
        elif isinstance(module, _BatchNorm):
            module.reset_parameters()
        elif any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False)):
            raise TypeError(f"no rule for the initial values of {name} ({type(module).__name__})")


def _initialise_convolution(conv: nn.Conv2d, seed: int, name: str) -> None:
    area = math.prod(conv.kernel_size)
    normal_(conv.weight, math.sqrt(2.0 / (area * conv.out_channels)), seed=seed, name=f"{name}.weight")
    if conv.bias is not None:
        fan_in = area * conv.in_channels // conv.groups
        uniform_(conv.bias, 1.0 / math.sqrt(fan_in), seed=seed, name=f"{name}.bias")
