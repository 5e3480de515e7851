//! Kubernetes label selectors in the syntax of `kubectl -l`: `app in (a,b),tier!=cache,!canary,team`.

use std::{collections::BTreeMap, fmt, str::FromStr};

/// A set of requirements, all of which must hold. An empty selector matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LabelSelector {
    requirements: Vec<Requirement>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Requirement {
    key: String,
    test: Test,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Test {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    Absent,
}

/// Reasons why a text is not a label selector.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SelectorError {
    /// The text has an unexpected token.
    #[error(
        "expected {expected} at character {at}, found {found}: write it like `app in (a,b),tier!=cache,!canary`"
    )]
    Expected {
        /// Description of the allowed tokens.
        expected: &'static str,
        /// The token in the text.
        found: String,
        /// Character of the text, counted from 1.
        at: usize,
    },
    /// The key is not a valid key of Kubernetes labels.
    #[error("`{0}` is not a label key: [prefix/]name, the name at most 63 of letters, digits, `-`, `_`, `.`")]
    Key(String),
    /// The value is not a valid value of Kubernetes labels.
    #[error("`{0}` is not a label value: at most 63 of letters, digits, `-`, `_`, `.`")]
    Value(String),
    /// The selector is longer than [`MAX_BYTES`].
    #[error("the selector has {0} bytes, and at most {MAX_BYTES} are allowed")]
    TooLong(usize),
}

/// Maximum length of a selector in bytes.
pub const MAX_BYTES: usize = 4096;

impl LabelSelector {
    /// Parses the text form.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        if text.len() > MAX_BYTES {
            return Err(SelectorError::TooLong(text.len()));
        }
        let mut parser = Parser { text, at: 0 };
        let mut requirements = Vec::new();
        if parser.peek() == Token::End {
            return Ok(Self { requirements });
        }
        loop {
            requirements.push(parser.requirement()?);
            match parser.next() {
                (_, Token::Comma) => {}
                (_, Token::End) => return Ok(Self { requirements }),
                (at, token) => return Err(expected("`,` or the end", &token, at)),
            }
        }
    }

    /// Returns the selector that requires all of these labels.
    pub(crate) fn from_labels(labels: &BTreeMap<String, String>) -> Result<Self, SelectorError> {
        let requirements = labels
            .iter()
            .map(|(key, value)| {
                Ok(Requirement { key: good_key(key)?, test: Test::In(vec![good_value(value)?]) })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { requirements })
    }

    /// Reports whether an object with these labels is selected. As in Kubernetes, `!=` and `notin` hold if the key is
    /// absent.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.requirements.iter().all(|Requirement { key, test }| {
            let value = labels.get(key);
            match test {
                Test::In(values) => value.is_some_and(|value| values.contains(value)),
                Test::NotIn(values) => value.is_none_or(|value| !values.contains(value)),
                Test::Exists => value.is_some(),
                Test::Absent => value.is_none(),
            }
        })
    }

    /// Reports whether the selector matches everything.
    pub fn is_empty(&self) -> bool {
        self.requirements.is_empty()
    }
}

impl FromStr for LabelSelector {
    type Err = SelectorError;

    fn from_str(text: &str) -> Result<Self, SelectorError> {
        Self::parse(text)
    }
}

impl fmt::Display for LabelSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, Requirement { key, test }) in self.requirements.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            match test {
                Test::Exists => f.write_str(key)?,
                Test::Absent => write!(f, "!{key}")?,
                Test::In(values) => match values.as_slice() {
                    [value] => write!(f, "{key}={value}")?,
                    values => write!(f, "{key} in ({})", values.join(","))?,
                },
                Test::NotIn(values) => match values.as_slice() {
                    [value] => write!(f, "{key}!={value}")?,
                    values => write!(f, "{key} notin ({})", values.join(","))?,
                },
            }
        }
        Ok(())
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token<'a> {
    Word(&'a str),
    Comma,
    Open,
    Close,
    Not,
    Equal,
    NotEqual,
    Other(char),
    End,
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '-' | '_' | '.' | '/')
}

fn expected(expected: &'static str, token: &Token<'_>, at: usize) -> SelectorError {
    let found = match token {
        Token::Word(word) => format!("`{word}`"),
        Token::Comma => "`,`".into(),
        Token::Open => "`(`".into(),
        Token::Close => "`)`".into(),
        Token::Not => "`!`".into(),
        Token::Equal => "`=`".into(),
        Token::NotEqual => "`!=`".into(),
        Token::Other(c) => format!("`{c}`"),
        Token::End => "the end".into(),
    };
    SelectorError::Expected { expected, found, at }
}

impl<'a> Parser<'a> {
    /// Returns the next token and the number of its first character, counted from 1.
    fn next(&mut self) -> (usize, Token<'a>) {
        let rest = &self.text[self.at..];
        let rest = rest.trim_start();
        self.at = self.text.len() - rest.len();
        let number = self.text[..self.at].chars().count() + 1;
        let (token, length) = match rest.chars().next() {
            None => (Token::End, 0),
            Some(',') => (Token::Comma, 1),
            Some('(') => (Token::Open, 1),
            Some(')') => (Token::Close, 1),
            Some('=') if rest.starts_with("==") => (Token::Equal, 2),
            Some('=') => (Token::Equal, 1),
            Some('!') if rest.starts_with("!=") => (Token::NotEqual, 2),
            Some('!') => (Token::Not, 1),
            Some(c) if is_word(c) => {
                let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
                (Token::Word(&rest[..end]), end)
            }
            Some(c) => (Token::Other(c), c.len_utf8()),
        };
        self.at += length;
        (number, token)
    }

    fn peek(&mut self) -> Token<'a> {
        let at = self.at;
        let (_, token) = self.next();
        self.at = at;
        token
    }

    fn key(&mut self) -> Result<String, SelectorError> {
        match self.next() {
            (_, Token::Word(word)) => good_key(word),
            (at, token) => Err(expected("a label key", &token, at)),
        }
    }

    fn requirement(&mut self) -> Result<Requirement, SelectorError> {
        if self.peek() == Token::Not {
            self.next();
            return Ok(Requirement { key: self.key()?, test: Test::Absent });
        }
        let key = self.key()?;
        let test = match self.peek() {
            Token::Comma | Token::End => Test::Exists,
            Token::Equal => {
                self.next();
                Test::In(vec![self.value()?])
            }
            Token::NotEqual => {
                self.next();
                Test::NotIn(vec![self.value()?])
            }
            Token::Word("in") => {
                self.next();
                Test::In(self.values()?)
            }
            Token::Word("notin") => {
                self.next();
                Test::NotIn(self.values()?)
            }
            _ => {
                let (at, token) = self.next();
                return Err(expected("`=`, `!=`, `in`, `notin`, `,` or the end", &token, at));
            }
        };
        Ok(Requirement { key, test })
    }

    /// Parses a value, which may be empty: `key=` and `in (a,)`.
    fn value(&mut self) -> Result<String, SelectorError> {
        match self.peek() {
            Token::Word(word) => {
                self.next();
                good_value(word)
            }
            Token::Comma | Token::Close | Token::End => Ok(String::new()),
            _ => {
                let (at, token) = self.next();
                Err(expected("a label value", &token, at))
            }
        }
    }

    fn values(&mut self) -> Result<Vec<String>, SelectorError> {
        match self.next() {
            (_, Token::Open) => {}
            (at, token) => return Err(expected("`(`", &token, at)),
        }
        let mut values = Vec::new();
        loop {
            values.push(self.value()?);
            match self.next() {
                (_, Token::Comma) => {}
                (_, Token::Close) => break,
                (at, token) => return Err(expected("`,` or `)`", &token, at)),
            }
        }
        values.sort();
        values.dedup();
        Ok(values)
    }
}

/// Checks the name part of a key, or a value: it starts and ends with a letter or digit.
fn is_name(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let ends = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_alphanumeric());
    text.len() <= 63 && text.bytes().all(inner) && ends(text.bytes().next()) && ends(text.bytes().last())
}

fn good_key(key: &str) -> Result<String, SelectorError> {
    let good = match key.split_once('/') {
        None => is_name(key),
        Some((prefix, name)) => prefix.len() <= 253 && prefix.split('.').all(is_dns_label) && is_name(name),
    };
    if good { Ok(key.to_owned()) } else { Err(SelectorError::Key(key.to_owned())) }
}

fn good_value(value: &str) -> Result<String, SelectorError> {
    if value.is_empty() || is_name(value) {
        Ok(value.to_owned())
    } else {
        Err(SelectorError::Value(value.to_owned()))
    }
}

/// Checks a DNS label, the form of namespace and container names: 1 to 63 characters of `[a-z0-9-]`, without `-` at the
/// start or end.
pub(crate) fn is_dns_label(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    fn labels(text: &str) -> BTreeMap<String, String> {
        text.split(',')
            .filter(|pair| !pair.is_empty())
            .map(|pair| pair.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned())).unwrap())
            .collect()
    }

    // The expected answers come from `kubectl get pods -l`.
    #[rstest]
    #[case("", "", true)]
    #[case("app=a", "app=a,x=1", true)]
    #[case("app==a", "app=b", false)]
    #[case("app!=a", "", true)]
    #[case("app!=a", "app=a", false)]
    #[case("app in (a, b)", "app=b", true)]
    #[case("app in (a,b),tier!=cache", "app=a,tier=cache", false)]
    #[case("app notin (a,b)", "app=c", true)]
    #[case("app notin (a,b)", "x=1", true)]
    #[case("app notin (a,b)", "app=a", false)]
    #[case("!canary", "canary=yes", false)]
    #[case(" ! canary , app ", "app=", true)]
    #[case("app", "tier=a", false)]
    #[case("in in (in),notin", "in=in,notin=1", true)]
    #[case("app=", "app=", true)]
    #[case("app=", "app=x", false)]
    #[case("app.kubernetes.io/name=web", "app.kubernetes.io/name=web", true)]
    fn selects_as_kubernetes_does(#[case] selector: &str, #[case] of: &str, #[case] selected: bool) {
        let parsed = LabelSelector::parse(selector).unwrap();
        assert_eq!(parsed.matches(&labels(of)), selected, "{selector} over {of}");
        assert_eq!(LabelSelector::parse(&parsed.to_string()), Ok(parsed));
    }

    #[rstest]
    #[case("app in a,b", "expected `(` at character 8, found `a`")]
    #[case("app in (a", "expected `,` or `)` at character 10, found the end")]
    #[case("app=a tier=b", "expected `,` or the end at character 7, found `tier`")]
    #[case("app>3", "expected `=`, `!=`, `in`, `notin`, `,` or the end at character 4, found `>`")]
    #[case(",", "expected a label key at character 1, found `,`")]
    #[case("app=a,", "expected a label key at character 7, found the end")]
    #[case("a/b/c=1", "`a/b/c` is not a label key")]
    #[case("app=-a", "`-a` is not a label value")]
    fn an_error_names_the_character_and_the_token(#[case] selector: &str, #[case] error: &str) {
        let found = LabelSelector::parse(selector).unwrap_err().to_string();
        assert!(found.starts_with(error), "{found}");
    }

    #[test]
    fn a_map_becomes_a_selector_of_its_labels() {
        let wanted = labels("app=checkout,tier=web");
        let selector = LabelSelector::from_labels(&wanted).unwrap();
        assert_eq!(selector.to_string(), "app=checkout,tier=web");
        assert!(selector.matches(&wanted));
        assert!(!selector.matches(&labels("app=checkout")));
        assert!(LabelSelector::from_labels(&labels("app=a b")).is_err());
    }

    proptest! {
        #[test]
        fn any_text_parses_without_a_panic(text in "\\PC{0,60}") {
            if let Ok(selector) = LabelSelector::parse(&text) {
                prop_assert_eq!(LabelSelector::parse(&selector.to_string()), Ok(selector));
            }
        }
        #[test]
        fn a_selector_reads_back_from_its_text(text in "(!?[a-c]|[a-c](=|!=| in | notin )\\([a-c](,[a-c]){0,2}\\)|[a-c](=|!=)[a-c])(,[a-c]=[a-c]){0,2}") {
            if let Ok(selector) = LabelSelector::parse(&text) {
                prop_assert_eq!(LabelSelector::parse(&selector.to_string()), Ok(selector));
            }
        }
    }
}
