// Helpers for PTX text, shared by the readers of a module and of a kernel.
#pragma once

#include <algorithm>
#include <cctype>
#include <sstream>
#include <unordered_map>

#include "ptx.h"

namespace ptx {

inline std::string trim(const std::string& s) {
  const size_t begin = s.find_first_not_of(" \t\r\n");
  return begin == std::string::npos ? "" : s.substr(begin, s.find_last_not_of(" \t\r\n") - begin + 1);
}

inline std::vector<std::string> split(const std::string& s, char separator) {
  std::vector<std::string> parts;
  std::stringstream stream(s);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(trim(part));
  return parts;
}

inline std::vector<std::string> words_of(const std::string& s) {
  std::stringstream stream(s);
  std::vector<std::string> words;
  for (std::string word; stream >> word;) words.push_back(word);
  return words;
}

inline bool starts(const std::string& s, const std::string& with) { return s.rfind(with, 0) == 0; }

inline Type type_from(const std::string& s) {
  static const std::unordered_map<std::string, Type> types{
      {"u8", Type::U8},   {"u16", Type::U16},   {"u32", Type::U32}, {"u64", Type::U64},   {"s8", Type::S8},
      {"s16", Type::S16}, {"s32", Type::S32},   {"s64", Type::S64}, {"b8", Type::B8},     {"b16", Type::B16},
      {"b32", Type::B32}, {"b64", Type::B64},   {"f16", Type::F16}, {"bf16", Type::BF16}, {"f32", Type::F32},
      {"f64", Type::F64}, {"pred", Type::Pred},
  };
  const auto found = types.find(s);
  return found == types.end() ? Type::None : found->second;
}

inline int64_t integer(const std::string& s) {
  return static_cast<int64_t>(s[0] == '-' ? std::stoll(s, nullptr, 0) : std::stoull(s, nullptr, 0));
}

inline bool is_float_literal(const std::string& s) {
  return s.size() > 2 && s[0] == '0' && (std::tolower(s[1]) == 'f' || std::tolower(s[1]) == 'd');
}

// `.align 16 .b8 name[64]` of a variable or parameter, whatever precedes it.
struct Declaration {
  std::string name;
  Type type = Type::B8;
  int align = 1, elements = 1;
  bool array = false;
  int bytes() const { return elements * size_of(type); }
};

inline Declaration declaration(const std::string& text) {
  const std::vector<std::string> words = words_of(text);
  Declaration d;
  d.name = words.back();
  for (size_t i = 0; i + 1 < words.size(); ++i) {
    if (words[i] == ".align") d.align = std::stoi(words[i + 1]);
    if (words[i][0] == '.' && type_from(words[i].substr(1)) != Type::None) d.type = type_from(words[i].substr(1));
  }
  const size_t bracket = d.name.find('[');
  d.array = bracket != std::string::npos;
  if (d.array) {
    const std::string count = d.name.substr(bracket + 1, d.name.find(']') - bracket - 1);
    d.elements = count.empty() ? 0 : std::stoi(count);
    d.name = d.name.substr(0, bracket);
  } else {
    d.align = std::max(d.align, size_of(d.type));
  }
  return d;
}

inline int aligned(int offset, int to) { return (offset + to - 1) / to * to; }

}  // namespace ptx
