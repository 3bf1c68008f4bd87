"""Every activation, beside the function of PyTorch that it is."""

from functools import partial

import torch.nn.functional as F

from efficient_densenet.kernels.interface import RELU, Activation

ACTIVATIONS = {
    "relu": (RELU, F.relu),
    "silu": (Activation("silu"), F.silu),
    "gelu": (Activation("gelu"), F.gelu),
    "gelu_tanh": (Activation("gelu_tanh"), partial(F.gelu, approximate="tanh")),
    "leaky_relu": (Activation("leaky_relu", (0.1,)), partial(F.leaky_relu, negative_slope=0.1)),
    "leaky_relu-negative": (
        Activation("leaky_relu", (-0.3,)),
        partial(F.leaky_relu, negative_slope=-0.3),
    ),
    "elu": (Activation("elu", (1.5,)), partial(F.elu, alpha=1.5)),
    "elu-negative": (Activation("elu", (-0.7,)), partial(F.elu, alpha=-0.7)),
    "identity": (Activation("identity"), lambda x: x.clone()),
}
