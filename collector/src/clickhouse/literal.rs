//! Texts of users in statements.

/// Returns a text as a literal of ClickHouse.
pub(super) fn literal(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('\'');
    for c in text.chars() {
        match c {
            '\'' | '\\' => quoted.extend(['\\', c]),
            '\0' => quoted.push_str("\\0"),
            c => quoted.push(c),
        }
    }
    quoted.push('\'');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("checkout", "'checkout'")]
    #[case("it's", r"'it\'s'")]
    #[case(r"\'; DROP TABLE x --", r"'\\\'; DROP TABLE x --'")]
    #[case("a\0é\n", "'a\\0é\n'")]
    fn a_text_cannot_leave_its_literal(#[case] text: &str, #[case] quoted: &str) {
        assert_eq!(literal(text), quoted);
    }
}
