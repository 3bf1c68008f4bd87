from typing import Literal
from efficient_densenet.reference import DenseBlock
Recompute = Literal["bottleneck", "norm", "none"]
class EfficientDenseBlock(DenseBlock):
    def __init__(self, *a, recompute: Recompute = "bottleneck", **k):
        super().__init__(*a, **k)
        self.recompute = recompute
