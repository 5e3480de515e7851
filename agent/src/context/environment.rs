//! The variables of the environment in which OpenTelemetry names the service.

use std::collections::BTreeMap;

use gannet_base::head;

/// The name of the service. It takes precedence over the same attribute in [`ATTRIBUTES`].
const SERVICE_NAME: &str = "OTEL_SERVICE_NAME";
/// Attributes of the resource: `key=value,key=value`, percent-encoded.
const ATTRIBUTES: &str = "OTEL_RESOURCE_ATTRIBUTES";
/// The variables that the agent reads. It reads no other one.
pub(super) const NAMES: [&str; 2] = [SERVICE_NAME, ATTRIBUTES];

/// Bytes that the agent reads of a variable. OpenTelemetry has no limit; baggage, whose form this is, has 8192.
const MAX_BYTES: usize = 8192;
/// Attributes that the agent reads of a variable.
const MAX_ATTRIBUTES: usize = 256;

/// The facts about its service in the environment of a process. A text is empty if the variable lacks it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Environment {
    /// The value of [`SERVICE_NAME`].
    pub(super) service_name: String,
    /// Those of the resource's attributes that name a service, by key.
    pub(super) attributes: BTreeMap<&'static str, String>,
}

impl Environment {
    /// Takes the facts out of these variables.
    pub(super) fn of(variables: &BTreeMap<String, String>) -> Self {
        let text = |name: &str| variables.get(name).map_or("", |text| head(text, MAX_BYTES));
        Self { service_name: text(SERVICE_NAME).trim().to_owned(), attributes: attributes(text(ATTRIBUTES)) }
    }
}

/// Parses the attributes that name a service. OpenTelemetry says that one error makes all of them void, so that no part of a value
/// with a comma passes for the whole.
fn attributes(text: &str) -> BTreeMap<&'static str, String> {
    let mut found = BTreeMap::new();
    for pair in text.split(',').filter(|pair| !pair.trim().is_empty()).take(MAX_ATTRIBUTES) {
        let Some((key, value)) = pair.split_once('=') else { return BTreeMap::new() };
        let Some(value) = decode(value.trim()) else { return BTreeMap::new() };
        if let Some(key) = super::KEYS.into_iter().find(|known| *known == key.trim()) {
            found.insert(key, value);
        }
    }
    found
}

/// Decodes percent-encoding; `None` if it is damaged, or the result is no text.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digit = |byte: u8| char::from(byte).to_digit(16);
                let value = digit(rest.next()?)? << 4 | digit(rest.next()?)?;
                u8::try_from(value).ok()?
            }
            other => other,
        });
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    fn of(name: &str, attributes: &str) -> Environment {
        let variables = [(SERVICE_NAME, name), (ATTRIBUTES, attributes)];
        Environment::of(&variables.map(|(name, text)| (name.to_owned(), text.to_owned())).into())
    }

    #[rstest]
    #[case("service.name=shop,service.version=1.2", "service.name=shop service.version=1.2")]
    #[case(" service.name = a%20b%2Cc , team=x", "service.name=a b,c")]
    #[case("service.name=Zo%C3%AB", "service.name=Zoë")]
    #[case("service.name=a=b", "service.name=a=b")]
    #[case("service.name=x,service.name=y", "service.name=y")]
    #[case("service.name=shop,oops", "")]
    #[case("service.name=shop,a=%zz", "")]
    #[case("service.name=%ff", "")]
    #[case("service.name=%2", "")]
    #[case("", "")]
    fn attributes_are_decoded_or_all_are_void(#[case] text: &str, #[case] expected: &str) {
        let found = of("", text).attributes;
        let shown: Vec<_> = found.iter().map(|(key, value)| format!("{key}={value}")).collect();
        assert_eq!(shown.join(" "), expected);
    }

    proptest! {
        #[test]
        fn no_text_breaks_the_reader(text in "(?s)(service.name=|,|%|=|[0-9a-f]|.){0,300}") {
            let found = of(&text, &text);
            prop_assert!(found.attributes.len() <= 3);
        }
    }
}
