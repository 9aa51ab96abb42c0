// The whole interpreter as one unit: the compiler sees through all of it.
#include "block.cpp"
#include "decode.cpp"
#include "interface.cpp"
#include "memory.cpp"
#include "mnemonic.cpp"
#include "module.cpp"
#include "steps.cpp"
#include "warp.cpp"
