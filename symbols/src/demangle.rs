//! Readable forms of the names that C++, Rust and Go compilers give to functions.

use std::fmt::{self, Write};

/// Maximum size of a name, in bytes. The names of some C++ templates would fill a profile.
pub const MAX_NAME_BYTES: usize = 2048;

/// Returns the readable form of a mangled name, as a programmer writes it. Returns other names unchanged.
pub fn demangle(raw: &str) -> String {
    let mut name = Limited(String::new());
    // An error means that the name reached the limit, or that it is not mangled after all.
    let done = if let Ok(symbol) = rustc_demangle::try_demangle(raw) {
        write!(name, "{symbol:#}").is_ok()
    } else if let Some(symbol) = cpp_symbol(raw) {
        symbol.structured_demangle(&mut name, &cpp_demangle::DemangleOptions::new()).is_ok()
    } else {
        false
    };
    let Limited(mut name) = name;
    if name.is_empty() {
        // Go's symbol table adds the calling convention to names of assembly functions; its other tables do not.
        let plain = raw.strip_suffix(".abi0").or_else(|| raw.strip_suffix(".abiinternal"));
        return cut(plain.unwrap_or(raw));
    }
    if !done {
        name.push('…');
    }
    name
}

fn cpp_symbol(raw: &str) -> Option<cpp_demangle::Symbol<&[u8]>> {
    // The parser needs time and stack in proportion to the length of the name.
    if !raw.starts_with("_Z") || raw.len() > MAX_NAME_BYTES {
        return None;
    }
    cpp_demangle::Symbol::new(raw.as_bytes()).ok()
}

/// Returns at most `MAX_NAME_BYTES` of the name, without control characters.
pub fn cut(name: &str) -> String {
    let mut limited = Limited(String::new());
    let whole = limited.write_str(name).is_ok();
    let Limited(mut name) = limited;
    if !whole {
        name.push('…');
    }
    name
}

/// A writer that accepts text up to the limit. The readable form can be many times longer than the mangled name.
struct Limited(String);

impl Write for Limited {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for character in text.chars() {
            if self.0.len() >= MAX_NAME_BYTES {
                return Err(fmt::Error);
            }
            self.0.push(if character.is_control() { '?' } else { character });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_read_as_programmers_write_them() {
        for (raw, expected) in [
            ("main", "main"),
            ("_ZN4core9panicking9panic_fmt17h5f1a6fd39197ad62E", "core::panicking::panic_fmt"),
            ("_RNvNtCs1234_7mycrate3foo3bar", "mycrate::foo::bar"),
            ("_ZN3foo3barEi", "foo::bar(int)"),
            ("_ZNSt6vectorIiSaIiEE9push_backEOi", "std::vector<int, std::allocator<int> >::push_back(int&&)"),
            ("_Znonsense", "_Znonsense"),
            ("runtime.goexit.abi0", "runtime.goexit"),
            ("a\u{1b}[31mb\n", "a?[31mb?"),
        ] {
            assert_eq!(demangle(raw), expected);
        }
    }

    #[test]
    fn a_name_that_grows_without_limit_is_cut() {
        // Each substitution doubles the text of the one before it.
        let mut raw = String::from("_Z1fI1aE");
        for level in 0..30 {
            write!(raw, "1bIS{level}_S{level}_E").unwrap();
        }
        assert!(demangle(&raw).len() <= MAX_NAME_BYTES + 4);
        assert!(demangle(&"x".repeat(1 << 20)).len() <= MAX_NAME_BYTES + 4);
    }

    proptest! {
        #[test]
        fn any_text_has_a_bounded_name(text in "(_ZN|_R|_Z|)[ -~]{0,300}") {
            let name = demangle(&text);
            prop_assert!(name.len() <= MAX_NAME_BYTES + 4);
            prop_assert!(text.is_empty() || !name.is_empty());
        }
    }
}
