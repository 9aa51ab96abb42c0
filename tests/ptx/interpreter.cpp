// The whole interpreter as one translation unit, so that the compiler can optimise across its files.
#include "block.cpp"
#include "decode.cpp"
#include "interface.cpp"
#include "memory.cpp"
#include "mnemonic.cpp"
#include "module.cpp"
#include "steps.cpp"
#include "warp.cpp"
