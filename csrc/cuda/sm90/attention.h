// Entry points of attention on Hopper, for the bindings.
#pragma once
#include <params.h>

#include <string>

// Launches o and lse on `stream`, a cudaStream_t. Throws std::invalid_argument with a sentence for what it does not
// take.
void attention_forward(const AttentionForwardParams& x, void* stream);

// The tile configuration for these widths and this many queries, as text; empty where there is none.
std::string attention_forward_config(int D, int D_v, int S_q);
