"""What learner and actor share; neither imports the other."""

from common.torchvision_ops import install

install()
