//! Selectors of series in the syntax of Prometheus: `{service_name="checkout",pod=~"checkout-.*"}`.

use std::fmt;

use gannet_proto::labels::Labels;
use regex::{Regex, RegexBuilder};

/// Conditions of one selector. People write far fewer.
const MAX_MATCHERS: usize = 64;
/// Memory of one compiled regular expression.
const MAX_REGEX_BYTES: usize = 1 << 20;

/// A syntax error in a selector, with its position.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("query, character {position}: {what}")]
pub(crate) struct SelectorError {
    /// Position in characters, from 1.
    pub(crate) position: usize,
    /// The fault, and the valid form.
    pub(crate) what: String,
}

/// A list of conditions on labels, all of which must hold. A missing label counts as an empty one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Selector {
    matchers: Vec<Matcher>,
}

/// A condition on one label.
#[derive(Debug, Clone)]
pub(crate) struct Matcher {
    name: String,
    value: String,
    /// If given, the value is a regular expression that must match the complete label value.
    regex: Option<Regex>,
    negated: bool,
}

impl Matcher {
    /// Returns the name of the label.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Returns the only value that fits, or `None` for a regular expression.
    pub(crate) fn plain(&self) -> Option<&str> {
        self.regex.is_none().then_some(&self.value)
    }

    /// Reports whether the condition holds for the values that do not fit.
    pub(crate) fn is_negated(&self) -> bool {
        self.negated
    }

    /// Reports whether a value fits.
    pub(crate) fn fits(&self, value: &str) -> bool {
        match &self.regex {
            Some(regex) => regex.is_match(value),
            None => self.value == value,
        }
    }
}

impl Selector {
    /// Returns the conditions.
    pub(crate) fn matchers(&self) -> &[Matcher] {
        &self.matchers
    }

    /// Parses a selector. An empty text, or `{}`, selects every series.
    pub(crate) fn parse(text: &str) -> Result<Self, SelectorError> {
        let mut parser = Parser { text, at: 0 };
        let mut matchers = Vec::new();
        parser.space();
        if parser.rest().is_empty() {
            return Ok(Self { matchers });
        }
        if !parser.eat("{") {
            return Err(parser.error("expected `{`, as in `{service_name=\"checkout\"}`"));
        }
        loop {
            parser.space();
            if parser.eat("}") {
                break;
            }
            if matchers.len() == MAX_MATCHERS {
                return Err(parser.error(&format!("more than {MAX_MATCHERS} conditions")));
            }
            matchers.push(parser.matcher()?);
            parser.space();
            if parser.eat("}") {
                break;
            }
            if !parser.eat(",") {
                return Err(parser.error("expected `,` or `}` after a condition"));
            }
        }
        parser.space();
        if !parser.rest().is_empty() {
            return Err(parser.error("nothing may follow the closing `}`"));
        }
        Ok(Self { matchers })
    }

    /// Returns the condition that a label has this value.
    pub(crate) fn equal(name: &str, value: &str) -> Self {
        let (name, value) = (name.to_owned(), value.to_owned());
        Self { matchers: vec![Matcher { name, value, regex: None, negated: false }] }
    }

    /// Returns the conditions of both.
    pub(crate) fn and(mut self, other: Self) -> Self {
        self.matchers.extend(other.matchers);
        self
    }

    /// Returns the conditions on labels for which `first` holds, and the others.
    pub(crate) fn split(self, first: impl Fn(&str) -> bool) -> (Self, Self) {
        let (first, others) = self.matchers.into_iter().partition(|matcher| first(&matcher.name));
        (Self { matchers: first }, Self { matchers: others })
    }

    /// Reports whether there is no condition.
    pub(crate) fn is_empty(&self) -> bool {
        self.matchers.is_empty()
    }

    /// Reports whether all conditions hold.
    pub(crate) fn matches(&self, labels: &Labels) -> bool {
        self.matches_by(|name| labels.get(name).map_or("", String::as_str))
    }

    /// Reports whether all conditions hold for the labels that `value` returns by name. A missing label is empty.
    pub(crate) fn matches_by<'l>(&self, value: impl Fn(&str) -> &'l str) -> bool {
        self.matchers.iter().all(|m| m.fits(value(&m.name)) != m.negated)
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("{")?;
        for (i, m) in self.matchers.iter().enumerate() {
            let operator = match (m.regex.is_some(), m.negated) {
                (false, false) => "=",
                (false, true) => "!=",
                (true, false) => "=~",
                (true, true) => "!~",
            };
            let value = escape(&m.value);
            let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
            let is_name = m.name.starts_with(|c: char| !c.is_ascii_digit()) && m.name.chars().all(is_plain);
            let name = if is_name { m.name.clone() } else { format!("\"{}\"", escape(&m.name)) };
            write!(f, "{}{name}{operator}\"{value}\"", if i > 0 { "," } else { "" })?;
        }
        f.write_str("}")
    }
}

fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Parser<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn space(&mut self) {
        self.at = self.text.len() - self.rest().trim_start().len();
    }

    fn eat(&mut self, token: &str) -> bool {
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    fn error(&self, what: &str) -> SelectorError {
        self.error_at(self.at, what)
    }

    fn error_at(&self, at: usize, what: &str) -> SelectorError {
        SelectorError { position: self.text[..at].chars().count() + 1, what: what.to_owned() }
    }

    fn matcher(&mut self) -> Result<Matcher, SelectorError> {
        let name = self.name()?;
        self.space();
        // The longer operators first: `=` begins `=~`.
        let (is_regex, negated) = if self.eat("=~") {
            (true, false)
        } else if self.eat("!~") {
            (true, true)
        } else if self.eat("!=") {
            (false, true)
        } else if self.eat("=") {
            (false, false)
        } else {
            return Err(self.error(&format!("expected `=`, `!=`, `=~` or `!~` after `{name}`")));
        };
        self.space();
        let begin = self.at;
        let value = self.string()?;
        let regex = if is_regex {
            let built = RegexBuilder::new(&format!("^(?:{value})$"))
                .dot_matches_new_line(true)
                .size_limit(MAX_REGEX_BYTES)
                .build();
            Some(built.map_err(|e| {
                let text = e.to_string();
                let reason = text.lines().last().unwrap_or_default();
                self.error_at(
                    begin,
                    &format!("not a regular expression: {}", reason.trim_start_matches("error: ")),
                )
            })?)
        } else {
            None
        };
        Ok(Matcher { name, value, regex, negated })
    }

    /// Parses a label name. As in Prometheus, one with other characters is in quotes; no series here has such a label.
    fn name(&mut self) -> Result<String, SelectorError> {
        let rest = self.rest();
        if rest.starts_with('"') {
            return self.string();
        }
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
        let name = &rest[..end];
        if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) {
            return Err(
                self.error("expected a label name: letters, digits and `_`, not beginning with a digit")
            );
        }
        self.at += end;
        Ok(name.to_owned())
    }

    fn string(&mut self) -> Result<String, SelectorError> {
        let begin = self.at;
        let mut chars = self.rest().char_indices();
        let Some((_, quote @ ('"' | '\'' | '`'))) = chars.next() else {
            return Err(self.error("expected a value in quotes"));
        };
        let mut value = String::new();
        while let Some((i, c)) = chars.next() {
            match c {
                c if c == quote => {
                    self.at = begin + i + 1;
                    return Ok(value);
                }
                '\\' if quote != '`' => match chars.next() {
                    Some((_, 'n')) => value.push('\n'),
                    Some((_, 't')) => value.push('\t'),
                    Some((_, c @ ('\\' | '"' | '\''))) => value.push(c),
                    Some((_, c)) => {
                        return Err(self.error_at(
                            begin + i,
                            &format!("`\\{c}` means nothing here: double the backslash, or put the value in backticks"),
                        ));
                    }
                    None => break,
                },
                c => value.push(c),
            }
        }
        Err(self.error_at(begin, &format!("the closing {quote} of this value is missing")))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    fn labels() -> Labels {
        [("service_name", "checkout"), ("pod", "checkout-7f"), ("q", "a\"b\\c")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into()
    }

    #[rstest]
    #[case("", true)]
    #[case(" {} ", true)]
    #[case(r#"{service_name="checkout"}"#, true)]
    #[case(r#"{service_name="check"}"#, false)]
    #[case(r#"{ service_name = 'checkout' , pod =~ "checkout-.*" , }"#, true)]
    #[case(r#"{pod=~"checkout"}"#, false)] // anchored
    #[case(r#"{pod=~"a|checkout-7f"}"#, true)]
    #[case(r#"{pod=~"a|checkout"}"#, false)] // anchored as a whole
    #[case(r#"{pod!~"check.*"}"#, false)]
    #[case(r#"{pod!="x",service_name!="y"}"#, true)]
    #[case(r#"{absent=""}"#, true)]
    #[case(r#"{absent!=""}"#, false)]
    #[case(r#"{absent=~".*"}"#, true)]
    #[case(r#"{q="a\"b\\c"}"#, true)]
    #[case(r#"{q=`a"b\c`}"#, true)]
    #[case(r#"{"service_name"="checkout"}"#, true)]
    #[case(r#"{"k8s.pod/\"name"="checkout"}"#, false)]
    #[case(r#"{"k8s.pod/\"name"!~"checkout"}"#, true)]
    fn selectors_match_as_in_prometheus(#[case] text: &str, #[case] matches: bool) {
        let selector = Selector::parse(text).unwrap();
        assert_eq!(selector.matches(&labels()), matches);
        let again = Selector::parse(&selector.to_string()).unwrap();
        assert_eq!(again.to_string(), selector.to_string());
        assert_eq!(again.matches(&labels()), matches);
    }

    #[rstest]
    #[case("service", 1, "expected `{`")]
    #[case("{a}", 3, "after `a`")]
    #[case("{a=b}", 4, "in quotes")]
    #[case("{a=\"b}", 4, "closing")]
    #[case("{a=\"b\" c=\"d\"}", 8, "expected `,`")]
    #[case("{é=\"b\"}", 2, "label name")]
    #[case("{a=\"é\",1=\"x\"}", 8, "label name")]
    #[case("{a=~\"(\"}", 5, "not a regular expression")]
    #[case("{a=\"\\d\"}", 5, "backslash")]
    #[case("{} x", 4, "nothing may follow")]
    #[case("{a=\"b\"", 7, "expected `,` or `}`")]
    fn errors_name_position_and_fault(#[case] text: &str, #[case] position: usize, #[case] what: &str) {
        let error = Selector::parse(text).unwrap_err();
        assert_eq!(error.position, position, "{error}");
        assert!(error.what.contains(what), "{error}");
    }

    proptest! {
        #[test]
        fn the_parser_survives_any_text(text in "\\PC{0,40}|[{}a=~!\"`'\\\\,\n ]{0,20}") {
            let _ = Selector::parse(&text);
        }

        #[test]
        fn any_value_round_trips(value in "\\PC{0,20}[\"\\\\\n\t]{0,3}") {
            let selector = Selector { matchers: vec![Matcher {
                name: "a".into(), value: value.clone(), regex: None, negated: false,
            }] };
            let again = Selector::parse(&selector.to_string()).unwrap();
            prop_assert!(again.matches(&[("a".to_owned(), value)].into()));
        }
    }
}
