// What the threads of a row are at most, and the shared memory that they exchange values in. For the host, too.
#pragma once

namespace rows {

constexpr int MAX_THREADS = 512, MAX_WARPS = MAX_THREADS / 32, MAX_CLUSTER = 8;

constexpr int SLOT = 16;                                             // bytes: FIELDS <= 4
constexpr int REDUCTION_BYTES = 2 * (MAX_WARPS + MAX_CLUSTER) * SLOT;  // two rounds, which take turns

}  // namespace rows
