"""What the kernels of every backend agree on: how many tokens share a pass, where sums may be cut, what is too large.

CMake reads this file, `rows.py` and `channels.py`: each line `NAME = number` is a constant of the same name in C++.
"""

NARROW_TOKENS = 16  # of a narrow pass at most: they share one reading of the weights
NEURON_STEP = 128  # neurons: an FFN cut over calls at multiples of this keeps its bits
MATRIX_STEP = 8  # bundles of eight rows of a matrix, likewise
DOWN_STEP = 512  # rows of down, likewise, where gate and up lie by channel
ATTENTION_SEGMENT = 256  # positions that attention sums by themselves, from multiples of it on
LARGEST_GROUP = 2048  # neurons of one bundle
LONGEST_ROW = 65536  # weights: longer rows no kernel takes
WIDEST_HEAD = 512  # numbers of one attention head, likewise
MOST_TAPS = 8  # rows that the convolution of a delta net takes together, likewise
