// A file that is cut off while weights are mapped from it: the process ends with a line that says so, not with SIGBUS.
#pragma once

#include <cstdint>

namespace partinfer {

// From now on, pages of [begin, begin + bytes) that can't be read end the process with exit code 1. False if there are
// too many such ranges already; these behave as without this.
bool watch_mapping(const void* begin, int64_t bytes);
void forget_mapping(const void* begin);

}  // namespace partinfer
