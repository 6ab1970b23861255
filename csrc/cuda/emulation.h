// What the module says of the emulator: on a GPU, nothing.
#pragma once

template <class Module>
void bind_emulation(Module&) {}
