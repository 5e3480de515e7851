//! Configuration layers: flags, environment variables, a YAML file, defaults.
//!
//! The clap structure of a program is its configuration. Each field is a flag, a variable and a key of the file under
//! one name, and its `#[arg(default_value…)]` is the only place of its default. The structure derives `clap::Args`,
//! `Serialize` and `Deserialize` with `#[serde(default)]`, and implements `Default` by [`defaults`].

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use clap::{ArgMatches, Args, Command, FromArgMatches, parser::ValueSource};
use serde::{
    Serialize,
    de::{self, DeserializeOwned, DeserializeSeed, IgnoredAny},
};
use serde_json::{Map, Value};

use crate::Renamed;

/// Reasons why a configuration cannot be used. The messages name the file, the line and the key.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("--config {}: {source}", path.display())]
    Read {
        /// The file that `--config` names.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The file is not YAML, has an unknown key, or a value of the wrong form.
    #[error("--config {}: {reason}", path.display())]
    Parse {
        /// The file that `--config` names.
        path: PathBuf,
        /// The line, the key and what is wrong, with an excerpt of the file.
        reason: String,
    },
    /// A value has no form in a file, such as a path that is not UTF-8.
    #[error("the configuration cannot be written as YAML: {0}")]
    Write(String),
}

/// Returns the options that hold without flags, variables and a file.
///
/// An option that must be given has no default: the program then ends with clap's error.
pub fn defaults<T: Args + FromArgMatches>() -> T {
    let command = T::augment_args(Command::new("defaults").no_binary_name(true));
    command
        .mut_args(|arg| arg.env(None::<&str>))
        .try_get_matches_from(Vec::<&str>::new())
        .and_then(|matches| T::from_arg_matches(&matches))
        .unwrap_or_else(|error| error.exit())
}

/// Returns the options in force: a flag takes precedence over a variable, a variable over the file, the file over the
/// default.
///
/// The lists that `additive` names hold the elements of both the command line and the file, so that something that the
/// file denies stays denied.
pub fn effective<T>(
    matches: &ArgMatches,
    file: Option<&Path>,
    additive: &[&str],
    renamed: &Renamed,
) -> Result<T, ConfigError>
where
    T: FromArgMatches + Serialize + DeserializeOwned,
{
    let given = T::from_arg_matches(matches).unwrap_or_else(|error| error.exit());
    let Some(path) = file else { return Ok(given) };
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    let mut options = keys_of(&given)?;
    let parse_error = |error: serde_saphyr::Error| ConfigError::Parse {
        path: path.to_owned(),
        reason: error.to_string().trim_start_matches("error: ").to_owned(),
    };
    let keys = read_keys(&text, &options, renamed).map_err(|error| {
        let names: Vec<&str> = options.keys().map(String::as_str).collect();
        match parse_error(error) {
            ConfigError::Parse { path, reason } if reason.contains("unknown key") => {
                ConfigError::Parse { path, reason: format!("{reason}\nthe keys are {}", names.join(", ")) }
            }
            error => error,
        }
    })?;
    if keys.is_empty() {
        return Ok(given);
    }
    let value_error = |error: serde_saphyr::Error| match wrong_value::<T>(&text, &keys) {
        Some(reason) if !error.to_string().contains("line ") => {
            ConfigError::Parse { path: path.to_owned(), reason }
        }
        _ => parse_error(error),
    };
    let mut in_file = keys_of(&serde_saphyr::from_str::<T>(&text).map_err(value_error)?)?;
    let on_command_line: Vec<&str> = matches
        .ids()
        .map(clap::Id::as_str)
        .filter(|id| {
            matches!(matches.value_source(id), Some(ValueSource::CommandLine | ValueSource::EnvVariable))
        })
        .collect();
    for key in keys {
        let Some(value) = in_file.remove(&key) else { continue };
        match options.get_mut(&key) {
            Some(Value::Array(list)) if additive.contains(&key.as_str()) => {
                list.extend(value.as_array().into_iter().flatten().cloned());
            }
            _ if on_command_line.contains(&key.as_str()) => {}
            _ => drop(options.insert(key, value)),
        }
    }
    serde_json::from_value(Value::Object(options))
        .map_err(|error| ConfigError::Parse { path: path.to_owned(), reason: error.to_string() })
}

/// Returns line, key and fault of the first wrong value. The parser does not report them for a value of a flattened
/// structure.
fn wrong_value<T: DeserializeOwned>(text: &str, keys: &[String]) -> Option<String> {
    let values: Map<String, Value> = serde_saphyr::from_str(text).ok()?;
    keys.iter().find_map(|key| {
        let alone = Map::from_iter([(key.clone(), values.get(key)?.clone())]);
        let error = serde_json::from_value::<T>(Value::Object(alone)).err()?;
        let line = text.lines().position(|line| line.starts_with(&format!("{key}:")))? + 1;
        Some(format!("line {line}: {key}: {error}"))
    })
}

/// Writes the options as YAML that `--config` reads back.
pub fn to_yaml<T: Serialize>(options: &T) -> Result<String, ConfigError> {
    serde_saphyr::to_string(options).map_err(|error| ConfigError::Write(error.to_string()))
}

fn keys_of<T: Serialize>(options: &T) -> Result<Map<String, Value>, ConfigError> {
    match serde_json::to_value(options) {
        Ok(Value::Object(keys)) => Ok(keys),
        Ok(_) => Err(ConfigError::Write("it is not a structure with keys".to_owned())),
        Err(error) => Err(ConfigError::Write(error.to_string())),
    }
}

/// Returns the keys that the file sets. An unknown key is an error at its line.
fn read_keys(
    text: &str,
    known: &Map<String, Value>,
    renamed: &Renamed,
) -> Result<Vec<String>, serde_saphyr::Error> {
    // A file with comments alone is an empty document, which is no mapping.
    if text.lines().all(|line| line.trim().is_empty() || line.trim().starts_with('#')) {
        return Ok(Vec::new());
    }
    serde_saphyr::with_deserializer_from_str(text, |deserializer| {
        Keys { known, renamed }.deserialize(deserializer)
    })
}

/// Reads a mapping, checks its keys and skips its values.
#[derive(Clone, Copy)]
struct Keys<'a> {
    known: &'a Map<String, Value>,
    renamed: &'a Renamed,
}

impl<'de> DeserializeSeed<'de> for Keys<'_> {
    type Value = Vec<String>;

    fn deserialize<D: de::Deserializer<'de>>(self, deserializer: D) -> Result<Vec<String>, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> de::Visitor<'de> for Keys<'_> {
    type Value = Vec<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("options as `key: value`")
    }

    fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Vec<String>, A::Error> {
        let mut keys = Vec::new();
        while let Some(key) = map.next_key_seed(Key(self))? {
            map.next_value::<IgnoredAny>()?;
            keys.push(key);
        }
        Ok(keys)
    }
}

/// Checks one key. The error arises while the parser stands at the key, so that it has the key's line.
struct Key<'a>(Keys<'a>);

impl<'de> DeserializeSeed<'de> for Key<'_> {
    type Value = String;

    fn deserialize<D: de::Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        deserializer.deserialize_identifier(self)
    }
}

impl de::Visitor<'_> for Key<'_> {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: de::Error>(self, key: &str) -> Result<String, E> {
        let Keys { known, renamed } = self.0;
        if known.contains_key(key) {
            return Ok(key.to_owned());
        }
        if let Some(new) = renamed.key(key) {
            return Err(E::custom(format!("`{key}` is now `{new}`")));
        }
        Err(E::custom(format!("unknown key `{key}`")))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use serde::Deserialize;

    use super::*;
    use crate::{ByteSize, TimeSpan};

    #[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
    #[serde(default)]
    struct Options {
        #[arg(long)]
        #[serde(skip)]
        config: Option<PathBuf>,
        #[arg(long, env = "GANNET_BASE_TEST_NODE")]
        node: Option<String>,
        #[arg(long, default_value = "10s")]
        window: TimeSpan,
        #[arg(long, default_value = "256MiB")]
        spool_bytes: ByteSize,
        #[arg(long)]
        insecure: bool,
        #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
        lifecycle: bool,
        #[arg(long, value_delimiter = ',')]
        label: Vec<String>,
        #[arg(long, value_delimiter = ',')]
        deny_uid: Vec<u32>,
        #[command(flatten)]
        #[serde(flatten)]
        limits: Limits,
    }

    #[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
    #[serde(default)]
    struct Limits {
        #[arg(long, default_value_t = 7)]
        max_nodes: u32,
        #[arg(long, default_value = "1MiB")]
        max_bytes: ByteSize,
    }

    impl Default for Options {
        fn default() -> Self {
            defaults()
        }
    }

    impl Default for Limits {
        fn default() -> Self {
            defaults()
        }
    }

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        options: Options,
    }

    const RENAMED: Renamed = Renamed { flags: &[("--name", "--node")], variables: &[] };

    fn read(file: &str, flags: &[&str]) -> Result<Options, ConfigError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("test.yaml");
        std::fs::write(&path, file).unwrap();
        let words = [&["test", "--config", path.to_str().unwrap()], flags].concat();
        let matches = <Cli as clap::CommandFactory>::command().try_get_matches_from(words).unwrap();
        let options = Options { config: None, ..effective(&matches, Some(&path), &["deny_uid"], &RENAMED)? };
        Ok(options)
    }

    #[test]
    fn a_flag_takes_precedence_over_the_file() {
        let file =
            "node: of-file\nspool_bytes: 1MiB\nwindow: 1m\nlifecycle: false\nlabel: [a=b]\nmax_nodes: 9\n";
        let options = read(file, &["--node", "of-flag", "--window", "10s", "--insecure"]).unwrap();
        let expected = Options {
            node: Some("of-flag".into()),
            spool_bytes: ByteSize(1 << 20),
            insecure: true,
            lifecycle: false,
            label: vec!["a=b".into()],
            limits: Limits { max_nodes: 9, ..Limits::default() },
            ..Options::default()
        };
        assert_eq!(options, expected);
    }

    #[test]
    fn the_file_takes_precedence_over_the_default() {
        for empty in ["", "\n# nothing yet\n"] {
            assert_eq!(read(empty, &[]).unwrap(), Options::default());
        }
        let options = read("node: 1234\ninsecure: true\n", &[]).unwrap();
        assert_eq!(options, Options { node: Some("1234".into()), insecure: true, ..Options::default() });
    }

    #[test]
    fn an_additive_list_holds_the_elements_of_both() {
        let options = read("deny_uid: [1, 2]\nlabel: [x]\n", &["--deny-uid", "3", "--label", "y"]).unwrap();
        assert_eq!((options.deny_uid, options.label), (vec![3, 1, 2], vec!["y".to_owned()]));
        assert_eq!(read("deny_uid: [1, 2]\n", &[]).unwrap().deny_uid, [1, 2]);
    }

    #[test]
    fn a_wrong_file_is_explained_with_line_and_key() {
        for (file, words) in [
            (
                "window: 10s\nnodes: x\n",
                &["line 2", "unknown key `nodes`", "max_nodes, node, spool_bytes"][..],
            ),
            ("\nname: x\n", &["line 2", "`name` is now `node`"]),
            ("\nwindow: fast\n", &["line 2", "window: fast", "`fast` is not a duration"]),
            ("max_nodes: many\n", &["line 1", "max_nodes: many"]),
            ("spool_bytes: 5 apples\n", &["line 1", "not a unit of bytes"]),
            ("\nmax_bytes: 5 apples\n", &["line 2: max_bytes: ", "not a unit of bytes"]),
            ("deny_uid: 5\n", &["line 1"]),
            ("- a\n", &["line 1"]),
            ("node: a\nnode: b\n", &["line 2", "node"]),
            ("node: [\n", &["line 1"]),
        ] {
            let error = read(file, &[]).unwrap_err().to_string();
            assert!(error.starts_with("--config /"), "{error}");
            for word in words {
                assert!(error.contains(word), "{file:?}: {error}");
            }
        }
        let matches = <Cli as clap::CommandFactory>::command().try_get_matches_from(["test"]).unwrap();
        let missing = effective::<Options>(&matches, Some(Path::new("/no/such/file")), &[], &RENAMED);
        assert!(missing.unwrap_err().to_string().starts_with("--config /no/such/file: "));
    }

    #[test]
    fn the_printed_options_read_back_as_themselves() {
        let flags = ["--node", "5", "--deny-uid", "1,2", "--label", "*,a=b", "--spool-bytes", "12345"];
        let options = read("window: 1h 30m\n", &flags).unwrap();
        assert_eq!(read(&to_yaml(&options).unwrap(), &[]).unwrap(), options);
        assert_eq!(read(&to_yaml(&Options::default()).unwrap(), &[]).unwrap(), Options::default());
    }
}
