from efficient_densenet.block import EfficientDenseBlock
from efficient_densenet.models import *
