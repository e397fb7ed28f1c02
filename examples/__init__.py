"""One folder for each task: data, reward, config.

Importing `common` first lets torchvision, which the image processors need, be imported beside a CPU build of torch.
"""

import common  # noqa: F401
