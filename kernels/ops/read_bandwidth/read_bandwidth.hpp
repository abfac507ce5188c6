// How fast this machine reads memory: the yardstick for decoding, which reads every weight once a token.
#pragma once

#include <cstdint>

namespace lilliput {

// Bytes a second at which `threads` threads together read a buffer of `bytes` bytes, each a part of its own, adding up
// its 64-byte lines; the best of `rounds` passes after one that does not count. Huge pages where the system gives them.
// Throws std::invalid_argument unless every thread has at least a page, std::bad_alloc where the memory is not there.
double read_bandwidth(int64_t bytes, int threads, int rounds);

}  // namespace lilliput
