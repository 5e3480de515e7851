//! Where ClickHouse finds the tables, and the table function that reads them there.

use std::{fmt, path::PathBuf, str::FromStr};

use super::literal::literal;

/// The value of `--query-tables`, or the place of the tables in `--data`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TableLocation {
    /// A directory on the machine of ClickHouse.
    Directory(PathBuf),
    /// The URL of a path in a bucket with the protocol of S3, without credentials.
    Bucket(url::Url),
    /// A named collection of ClickHouse that has URL and credentials. The tables are below its URL.
    Collection(String),
}

const FORMS: &str =
    "write a directory, a URL like https://BUCKET.s3.REGION.amazonaws.com/PATH/table, or collection=NAME";

impl FromStr for TableLocation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(name) = text.strip_prefix("collection=") {
            let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
            if name.is_empty() || !name.chars().all(is_name) || name.starts_with(|c: char| c.is_ascii_digit())
            {
                return Err(format!("`{name}` cannot be the name of a collection: {FORMS}"));
            }
            return Ok(Self::Collection(name.to_owned()));
        }
        if !text.contains("://") {
            if !text.starts_with('/') {
                return Err(format!("`{text}` is no absolute path: {FORMS}"));
            }
            return Ok(Self::Directory(text.into()));
        }
        let url = url::Url::parse(text).map_err(|error| format!("{error}: {FORMS}"))?;
        if !matches!(url.scheme(), "http" | "https" | "s3") || url.host_str().is_none_or(str::is_empty) {
            return Err(format!("{}:// is no bucket that ClickHouse reads tables in: {FORMS}", url.scheme()));
        }
        if url.query().is_some()
            || url.fragment().is_some()
            || !url.username().is_empty()
            || url.password().is_some()
        {
            return Err(format!("the URL holds more than a bucket and a path: {FORMS}"));
        }
        Ok(Self::Bucket(url))
    }
}

impl fmt::Display for TableLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => path.display().fmt(f),
            Self::Bucket(url) => f.write_str(url.as_str().trim_end_matches('/')),
            Self::Collection(name) => write!(f, "collection={name}"),
        }
    }
}

gannet_base::serde_as_text!(TableLocation);

impl TableLocation {
    /// Returns the call of the table function that reads a table.
    pub(super) fn function(&self, table: &str) -> String {
        match self {
            Self::Directory(path) => {
                format!("deltaLakeLocal({})", literal(&path.join(table).to_string_lossy()))
            }
            Self::Bucket(_) => format!("deltaLakeS3({})", literal(&format!("{self}/{table}"))),
            Self::Collection(name) => format!("deltaLakeS3({name}, filename = {})", literal(table)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("/var/lib/gannet/table", "deltaLakeLocal('/var/lib/gannet/table/samples')")]
    #[case("/it's/table", r"deltaLakeLocal('/it\'s/table/samples')")]
    #[case(
        "https://b.s3.eu-west-1.amazonaws.com/p/table/",
        "deltaLakeS3('https://b.s3.eu-west-1.amazonaws.com/p/table/samples')"
    )]
    #[case("collection=gannet", "deltaLakeS3(gannet, filename = 'samples')")]
    fn each_location_has_its_table_function(#[case] text: &str, #[case] function: &str) {
        assert_eq!(text.parse::<TableLocation>().unwrap().function("samples"), function);
    }

    #[rstest::rstest]
    #[case("data/table", "no absolute path")]
    #[case("ftp://server/table", "no bucket")]
    #[case("https://key:secret@server/table", "more than a bucket")]
    #[case("collection=a'b", "cannot be the name")]
    fn a_wrong_location_is_refused_with_the_forms(#[case] text: &str, #[case] reason: &str) {
        let error = text.parse::<TableLocation>().unwrap_err();
        assert!(error.contains(reason) && error.contains("collection=NAME"), "{error}");
    }
}
