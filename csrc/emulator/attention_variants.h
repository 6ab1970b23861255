// The attention forward with another configuration, or with a mistake planted in it: what the tests of the emulator
// and of the kernel run beside the kernel itself.
#pragma once
#include <params.h>

#include <string>
#include <vector>

namespace emulator {

// For the launches of attention_forward_variant to come. Throws std::invalid_argument for a name that there is not.
void set_attention_variant(const std::string& config, const std::string& bug);
std::vector<std::string> attention_variants();  // configs
std::vector<std::string> attention_bugs();
void attention_forward_variant(const AttentionForwardParams& x, void* stream);

}  // namespace emulator
