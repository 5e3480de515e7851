//! The HTTP endpoint `/ingest`: a profile in the body, and everything else in the query string.

use std::{collections::HashMap, sync::Arc};

use axum::{
    extract::{FromRequest as _, Multipart, Query as UrlQuery, Request, State},
    http::{HeaderMap, header},
    response::{IntoResponse as _, Response},
};
use gannet_proto::pprof::{self, Builder, Header, Line, Profile};
use serde::Deserialize;
use tonic::Status;

use super::{
    legacy::parse_time,
    push::{Pushed, Pushes, busy, invalid, retry_later, user_agent},
    wire,
};
use crate::{auth::Caller, http_body::read_message, time};

/// Samples a second, if the client does not say.
const DEFAULT_RATE: u32 = 100;

/// Lines of a profile in text. It bounds the memory of the stacks, which are larger than their lines.
const MAX_LINES: usize = 200_000;

type Params = HashMap<String, String>;

/// The form of the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Pprof,
    /// A stack and its number of samples on each line.
    Folded,
    /// A stack on each line.
    Lines,
}

/// How a client wants the values of one sample type shown.
#[derive(Default, Deserialize)]
#[serde(default)]
struct TypeConfig {
    #[serde(rename = "display-name")]
    display_name: String,
}

pub(super) async fn ingest(
    State(pushes): State<Arc<Pushes>>,
    UrlQuery(params): UrlQuery<Params>,
    request: Request,
) -> Response {
    let Ok(_slot) = pushes.slots().try_acquire() else { return wire::error_response(&busy()) };
    let stored = store(&pushes, &params, request).await;
    retry_later(stored.map_or_else(|status| wire::error_response(&status), |()| ().into_response()))
}

async fn store(pushes: &Pushes, params: &Params, request: Request) -> Result<(), Status> {
    let caller = request.extensions().get::<Caller>().cloned().unwrap_or_default();
    let (head, body) = request.into_parts();
    let text = |name: &str| params.get(name).map_or("", String::as_str);
    let (mut labels, now) = (parse_name(text("name"))?, time::now_ms());
    let time = |name: &str| match text(name) {
        "" => Ok(None),
        text => parse_time(text, now)
            .map(Some)
            .map_err(|error| Status::invalid_argument(format!("{name}: {error}"))),
    };
    let (start_ms, end_ms) = (time("from")?, time("until")?);
    let duration_ms = start_ms.zip(end_ms).map_or(0, |(start, end)| end.saturating_sub(start));
    let format = format_of(text("format"), &head.headers)?;
    let rate = match text("sampleRate") {
        "" => DEFAULT_RATE,
        text => text.parse().ok().filter(|rate| (1..=1_000_000_000).contains(rate)).ok_or_else(|| {
            Status::invalid_argument("sampleRate: not a number of samples a second, 1 to 1000000000")
        })?,
    };
    let sender = Some(text("spyName")).filter(|name| !name.is_empty());
    let sender = sender.map_or_else(|| user_agent(&head.headers), |name| name.chars().take(64).collect());
    let body = read_message(&head.headers, body, pushes.max_message_bytes()).await?;
    let (units, max_inflated) = (text("units").to_owned(), pushes.max_inflated());
    let (body, config) =
        if is_multipart(&head.headers) { parts(head.headers, body).await? } else { (body, None) };
    labels.extend(
        config.as_deref().and_then(name_of_config).map(|name| ("__name__".to_owned(), name.to_owned())),
    );
    let read = move || {
        let profile = match format {
            Format::Pprof => pprof::decode(&body, max_inflated).map_err(|error| invalid(&error)),
            Format::Folded => parse_lines(&body, true, &units, rate),
            Format::Lines => parse_lines(&body, false, &units, rate),
        };
        Ok(Pushed { labels, profile: profile?, id: None, start_ms, duration_ms, sender })
    };
    pushes.store(read, &caller).await
}

fn is_multipart(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    kind.is_some_and(|kind| kind.trim_start().starts_with("multipart/form-data"))
}

pub(super) fn format_of(format: &str, headers: &HeaderMap) -> Result<Format, Status> {
    match format {
        "pprof" => Ok(Format::Pprof),
        "" if is_multipart(headers) => Ok(Format::Pprof),
        "folded" | "collapsed" | "groups" => Ok(Format::Folded),
        "lines" => Ok(Format::Lines),
        other => {
            let other: String = other.chars().take(32).collect();
            Err(Status::invalid_argument(format!(
                "format: `{other}` is not accepted; send pprof (in the body, or as `profile` of a form), folded or lines"
            )))
        }
    }
}

/// Parses `app{region=eu,version=2}` into labels. The application is the service, unless a label names it.
pub(super) fn parse_name(name: &str) -> Result<Vec<(String, String)>, Status> {
    let (app, rest) = name.split_once('{').unwrap_or((name, "}"));
    let invalid = || Status::invalid_argument("name: write an application and labels, as in shop{region=eu}");
    let tags = rest.trim_end().strip_suffix('}').ok_or_else(invalid)?;
    if app.trim().is_empty() {
        return Err(invalid());
    }
    let mut labels = Vec::new();
    for tag in tags.split(',').map(str::trim).filter(|tag| !tag.is_empty()) {
        let (label, value) = tag.split_once('=').ok_or_else(invalid)?;
        labels.push((label.trim().to_owned(), value.trim().trim_matches('"').to_owned()));
    }
    if !labels.iter().any(|(label, _)| label == "service_name") {
        labels.push(("service_name".to_owned(), app.trim().to_owned()));
    }
    Ok(labels)
}

/// Returns the profile and the configuration of sample types in a form.
pub(super) async fn parts(headers: HeaderMap, body: Vec<u8>) -> Result<(Vec<u8>, Option<Vec<u8>>), Status> {
    let invalid =
        |error: &dyn std::fmt::Display| Status::invalid_argument(format!("the form is damaged: {error}"));
    let mut request = Request::new(body.into());
    *request.headers_mut() = headers;
    let mut form = Multipart::from_request(request, &()).await.map_err(|error| invalid(&error))?;
    let (mut profile, mut config) = (None, None);
    while let Some(field) = form.next_field().await.map_err(|error| invalid(&error))? {
        let name = field.name().unwrap_or_default().to_owned();
        let bytes = field.bytes().await.map_err(|error| invalid(&error))?;
        match name.as_str() {
            "profile" => profile = Some(bytes.to_vec()),
            "sample_type_config" => config = Some(bytes.to_vec()),
            "prev_profile" if !bytes.is_empty() => {
                return Err(Status::invalid_argument(
                    "prev_profile: the collector does not subtract profiles; use a client that sends what happened since the \
                     last profile",
                ));
            }
            _ => {}
        }
    }
    let profile = profile.ok_or_else(|| Status::invalid_argument("profile: the form has no such part"))?;
    Ok((profile, config))
}

/// Returns the name of profiles that have the sample types of others: Go's clients write it into the configuration of types.
pub(super) fn name_of_config(config: &[u8]) -> Option<&'static str> {
    let types: HashMap<String, TypeConfig> = serde_json::from_slice(config).ok()?;
    let is = |prefix: &str| types.values().any(|of| of.display_name.starts_with(prefix));
    match () {
        () if is("block_") => Some("block"),
        () if is("mutex_") => Some("mutex"),
        () => None,
    }
}

/// Builds a profile from lines of text: `main;work 12`, or without a number.
pub(super) fn parse_lines(body: &[u8], has_counts: bool, units: &str, rate: u32) -> Result<Profile, Status> {
    let text = std::str::from_utf8(body).map_err(|_| Status::invalid_argument("the body is not UTF-8"))?;
    let period = 1_000_000_000 / i64::from(rate);
    let (types, weights): (&[(&str, &str)], &[i64]) = match units {
        "objects" => (&[("inuse_objects", "count")], &[1]),
        "bytes" => (&[("inuse_space", "bytes")], &[1]),
        _ => (&[("samples", "count"), ("cpu", "nanoseconds")], &[1, period]),
    };
    let mut builder = Builder::new(Header {
        sample_types: types,
        period_type: types.last().copied().unwrap_or_default(),
        period: weights.last().copied().unwrap_or(1),
        time_nanos: 0,
        duration_nanos: 0,
    });
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        if number >= MAX_LINES {
            return Err(Status::invalid_argument(format!(
                "the body has more than {MAX_LINES} lines: send fewer, or pprof"
            )));
        }
        let (stack, count) = if has_counts {
            let split = line.trim_end().rsplit_once(' ');
            let parsed = split.and_then(|(stack, n)| Some((stack, n.parse::<u32>().ok()?)));
            parsed.ok_or_else(|| {
                Status::invalid_argument(format!(
                    "line {}: expected a stack and a number, `main;work 12`",
                    number + 1
                ))
            })?
        } else {
            (line, 1)
        };
        let locations: Vec<_> = stack
            .rsplit(';')
            .map(|name| {
                let line = Line { name, system_name: name, file: "", line: 0, column: 0, start_line: 0 };
                builder.location(None, 0, &[line])
            })
            .collect();
        let values: Vec<i64> = weights.iter().map(|weight| weight * i64::from(count)).collect();
        builder.sample(&locations, &values, &[]);
    }
    Ok(builder.finish())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("shop", Some("service_name=shop"))]
    #[case("shop{}", Some("service_name=shop"))]
    #[case("shop{region=eu, version=\"2\",}", Some("region=eu version=2 service_name=shop"))]
    #[case("shop{service_name=cart,otel.scope.name=a/b}", Some("service_name=cart otel.scope.name=a/b"))]
    #[case("", None)]
    #[case("{a=b}", None)]
    #[case("shop{a=b", None)]
    #[case("shop{a}", None)]
    fn names_hold_labels(#[case] name: &str, #[case] want: Option<&str>) {
        let found = parse_name(name).ok().map(|labels| {
            let texts: Vec<String> = labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
            texts.join(" ")
        });
        assert_eq!(found.as_deref(), want);
    }

    #[test]
    fn lines_become_stacks() {
        let profile = parse_lines(b"main;work 3\nmain 1\n\nmain;work 2\n", true, "samples", 100).unwrap();
        assert_eq!(pprof::folded(&profile, 0).unwrap(), "main 1\nmain;work 5\n");
        assert_eq!(pprof::check(&profile).unwrap().totals, [6, 60_000_000]);
        let profile = parse_lines(b"a;b\na;b", false, "objects", 100).unwrap();
        assert_eq!(pprof::folded(&profile, 0).unwrap(), "a;b 2\n");
        let error = parse_lines(&b"a\n".repeat(MAX_LINES + 1), false, "", 100).unwrap_err();
        assert!(error.message().contains("200000 lines"), "{error}");
        let error = parse_lines(b"main 1\nmain x\n", true, "", 100).unwrap_err();
        assert!(error.message().contains("line 2"), "{error}");
    }

    proptest! {
        #[test]
        fn any_name_and_lines_are_read_without_a_panic(
            name in "\\PC{0,40}|a\\{[a-c=,\" {}]{0,20}\\}?",
            body in proptest::collection::vec(any::<u8>(), 0..60),
            lines in "([a-c;]{0,8} ?[0-9]{0,12}\n?){0,8}",
        ) {
            let _ = parse_name(&name);
            let _ = parse_lines(&body, true, "", 100);
            for has_counts in [true, false] {
                if let Ok(profile) = parse_lines(lines.as_bytes(), has_counts, "samples", u32::MAX) {
                    prop_assert!(pprof::check(&profile).is_ok());
                }
            }
        }
    }

    #[test]
    fn the_configuration_of_types_names_the_profile() {
        let config = br#"{"contentions":{"display-name":"block_count","units":"lock_samples"},"x":{"cumulative":true}}"#;
        assert_eq!(name_of_config(config), Some("block"));
        assert_eq!(name_of_config(b"{}"), None);
        assert_eq!(name_of_config(b"damaged"), None);
    }
}
