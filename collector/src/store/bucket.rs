//! Buckets of the clouds' object stores.

use std::{sync::Arc, time::Duration};

use object_store::{
    ObjectStore, RetryConfig, aws::AmazonS3Builder, azure::MicrosoftAzureBuilder,
    gcp::GoogleCloudStorageBuilder, prefix::PrefixStore,
};

/// A bucket and a path in it: `s3://BUCKET/PATH`, `gs://BUCKET/PATH`, `az://CONTAINER/PATH`.
#[derive(Clone, PartialEq, Eq)]
pub struct Bucket {
    url: url::Url,
    /// Settings by the lowercase names of [`object_store`], like `aws_region`.
    settings: Vec<(String, String)>,
}

impl Bucket {
    /// Parses a URL. Credentials, region and endpoint come from the environment, under the names that the tools of the
    /// clouds use. An error names the valid forms.
    pub fn parse(text: &str) -> Result<Self, String> {
        let forms = "write s3://BUCKET/PATH, gs://BUCKET/PATH, az://CONTAINER/PATH, or a directory";
        let url = url::Url::parse(text).map_err(|error| format!("{error}: {forms}"))?;
        if !matches!(url.scheme(), "s3" | "gs" | "az") {
            return Err(format!("{}:// is not a supported kind of bucket: {forms}", url.scheme()));
        }
        if url.host_str().is_none_or(str::is_empty) {
            return Err(format!("the URL names no bucket: {forms}"));
        }
        if url.query().is_some()
            || url.fragment().is_some()
            || !url.username().is_empty()
            || url.port().is_some()
        {
            return Err(format!(
                "the URL holds more than a bucket and a path: {forms}; everything else comes from the environment"
            ));
        }
        let settings = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .filter(|(name, _)| ["AWS_", "GOOGLE_", "AZURE_"].iter().any(|cloud| name.starts_with(cloud)))
            .map(|(name, value)| (name.to_lowercase(), value))
            .collect();
        Ok(Self { url, settings })
    }

    /// Sets a value that otherwise comes from the environment. `name` is in lowercase, like `aws_region`.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.settings.push((name.to_owned(), value.into()));
        self
    }

    /// Returns the URL of a path below this one for programs that read S3's protocol, without credentials. `None` for a cloud that does
    /// not speak it.
    pub(crate) fn http_url(&self, below: &str) -> Option<url::Url> {
        let setting = |names: [&str; 2]| {
            let found = self.settings.iter().rev().find(|(name, _)| names.contains(&name.as_str()));
            found.map(|(_, value)| value.trim_end_matches('/'))
        };
        let (bucket, path) = (self.url.host_str()?, self.url.path().trim_matches('/'));
        let root = match self.url.scheme() {
            "s3" => {
                let region = setting(["aws_region", "aws_default_region"]).unwrap_or("us-east-1");
                setting(["aws_endpoint", "aws_endpoint_url"]).map_or_else(
                    || format!("https://{bucket}.s3.{region}.amazonaws.com"),
                    |endpoint| format!("{endpoint}/{bucket}"),
                )
            }
            "gs" => format!("https://storage.googleapis.com/{bucket}"),
            _ => return None,
        };
        let parts: Vec<&str> =
            [root.as_str(), path, below].into_iter().filter(|part| !part.is_empty()).collect();
        url::Url::parse(&parts.join("/")).ok()
    }

    /// Builds the client, which sees the bucket's path as its root. Does not access the bucket.
    pub(crate) fn connect(&self) -> Result<Arc<dyn ObjectStore>, object_store::Error> {
        // An agent waits for the answer, and sends a throttled batch again. So few retries are enough.
        let retry =
            RetryConfig { max_retries: 3, retry_timeout: Duration::from_secs(20), ..RetryConfig::default() };
        macro_rules! build {
            ($builder:ty) => {{
                let mut builder = <$builder>::new().with_url(self.url.as_str()).with_retry(retry);
                for (name, value) in &self.settings {
                    // The environment also holds settings for other tools.
                    if let Ok(key) = name.parse() {
                        builder = builder.with_config(key, value);
                    }
                }
                Arc::new(PrefixStore::new(builder.build()?, self.url.path()))
            }};
        }
        Ok(match self.url.scheme() {
            "s3" => build!(AmazonS3Builder),
            "gs" => build!(GoogleCloudStorageBuilder),
            _ => build!(MicrosoftAzureBuilder),
        })
    }
}

/// Leaves out the settings, which may hold secrets.
impl std::fmt::Debug for Bucket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bucket({})", self.url)
    }
}

impl std::fmt::Display for Bucket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.url.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case::scheme("ftp://bucket/x", "ftp:// is not a supported kind of bucket")]
    #[case::nameless("s3:///x", "names no bucket")]
    #[case::secret("s3://key@bucket/x", "from the environment")]
    #[case::query("gs://bucket/x?region=y", "from the environment")]
    #[case::no_url("s3:// /", "write s3://BUCKET/PATH")]
    fn invalid_bucket_urls_are_refused_with_valid_forms(#[case] text: &str, #[case] cure: &str) {
        let error = Bucket::parse(text).unwrap_err();
        assert!(error.contains(cure) && error.contains("or a directory"), "{error}");
    }

    #[rstest::rstest]
    #[case("s3://b/some/path", &[("aws_region", "eu-west-1")], Some("https://b.s3.eu-west-1.amazonaws.com/some/path/table"))]
    #[case("s3://b", &[("aws_endpoint", "http://minio:9000/")], Some("http://minio:9000/b/table"))]
    #[case("gs://b/p/", &[], Some("https://storage.googleapis.com/b/p/table"))]
    #[case("az://b/p", &[], None)]
    fn a_bucket_has_a_url_for_other_programs(
        #[case] text: &str,
        #[case] settings: &[(&str, &str)],
        #[case] url: Option<&str>,
    ) {
        let mut bucket = Bucket { settings: Vec::new(), ..Bucket::parse(text).unwrap() };
        for (name, value) in settings {
            bucket = bucket.with(name, *value);
        }
        assert_eq!(bucket.http_url("table").map(String::from).as_deref(), url);
    }

    #[test]
    fn credentials_of_a_bucket_are_not_printed() {
        let bucket = Bucket::parse("s3://bucket/some/path").unwrap().with("aws_secret_access_key", "hidden");
        assert_eq!(format!("{bucket} {bucket:?}"), "s3://bucket/some/path Bucket(s3://bucket/some/path)");
    }
}
