"""Sizes that kernels are tested with, wherever they run."""

# tokens, columns (not all multiples of a vector), rows, prefix, rows in the list
FFN_SIZES = [
    (1, 576, 300, 90, 30),
    (1, 7, 9, 2, 3),
    (2, 33, 17, 0, 17),
    (3, 100, 53, 20, 1),
    (8, 65, 31, 31, 0),
    (11, 128, 64, 9, 5),
    (3, 96, 700, 697, 2),  # rows in order, more than are computed together
]
# the same where columns must make up whole groups
QUANTIZED_FFN_SIZES = [
    (1, 576, 300, 90, 30),
    (1, 32, 9, 2, 3),
    (2, 96, 17, 0, 17),
    (3, 160, 53, 20, 1),
    (8, 1056, 31, 31, 0),
    (11, 128, 64, 9, 5),
]
# inputs, outputs of floats, and of quantised weights; the last ones are more columns than are added to at a time
BY_INPUT_SIZES = [(37, 65, 96), (130, 576, 576), (53, 4737, 4704), (41, 14001, 13984)]
# tokens, rows; columns of floats (not all multiples of a vector), and of quantised weights
SUM_SIZES = [
    (1, 300, 576, 576),
    (1, 9, 7, 32),
    (2, 17, 33, 96),
    (3, 53, 100, 160),
    (8, 31, 65, 1056),
    (19, 70, 128, 128),
]
