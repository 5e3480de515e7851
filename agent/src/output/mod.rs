//! Writes a finished profile as a file: pprof, folded stacks, or a flame graph.

mod flame;

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    str::FromStr,
    time::SystemTime,
};

use gannet_proto::{ledger::Ledger, pprof, profiles::Profile};

/// Format of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// pprof, compressed with gzip.
    Pprof,
    /// One line per stack, frames separated by semicolons, then its value.
    Folded,
    /// Interactive flame graph as a picture.
    Svg,
    /// Page with the flame graph and details of the profile.
    Html,
}

/// Reasons why a profile cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// The ending of the file name is unknown.
    #[error("unknown format of `{0}`: the name must end in .pb.gz, .folded, .svg or .html")]
    UnknownEnding(PathBuf),
    /// The profile has no samples.
    #[error("the profile has no samples")]
    Empty,
    /// The profile is not valid.
    #[error("the profile is damaged: {0}")]
    Damaged(&'static str),
    /// Drawing the flame graph failed.
    #[error("cannot draw the flame graph: {0}")]
    Draw(String),
    /// Writing the file failed.
    #[error("cannot write `{path}`: {error}")]
    Write {
        /// Path of the file.
        path: PathBuf,
        /// The system's error.
        error: io::Error,
    },
}

impl Format {
    const ENDINGS: [(&'static str, Self); 4] =
        [(".pb.gz", Self::Pprof), (".folded", Self::Folded), (".svg", Self::Svg), (".html", Self::Html)];

    /// Returns the format for the ending of a file name.
    pub fn of_path(path: &Path) -> Result<Self, OutputError> {
        let name =
            path.file_name().map(|name| name.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
        Self::ENDINGS
            .iter()
            .find(|(ending, _)| name.len() > ending.len() && name.ends_with(ending))
            .map(|(_, format)| *format)
            .ok_or_else(|| OutputError::UnknownEnding(path.to_owned()))
    }
}

/// File and format of a profile. The caller checks both before it takes samples.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    path: PathBuf,
    format: Format,
}

impl Destination {
    /// Returns the default file `gannet-COMM-TIME.pb.gz` in the working directory, with the time in UTC.
    pub fn default_for(comm: &str, now: SystemTime) -> Self {
        let safe: String = comm
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' })
            .collect();
        let time = jiff::Timestamp::try_from(now).unwrap_or_default().strftime("%Y%m%dT%H%M%SZ").to_string();
        Self { path: PathBuf::from(format!("gannet-{safe}-{time}.pb.gz")), format: Format::Pprof }
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the format of the file.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Writes the profile. The file appears complete or not at all.
    pub fn write(&self, profile: &Profile, details: &Details) -> Result<(), OutputError> {
        let bytes = render(profile, self.format, details)?;
        let failed = |error| OutputError::Write { path: self.path.clone(), error };
        let directory = match self.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let mut aside = tempfile::Builder::new().prefix(".gannet-").tempfile_in(directory).map_err(failed)?;
        aside.write_all(&bytes).map_err(failed)?;
        // Only the owner can read a temporary file; the final file gets the permissions of the user's umask.
        let mode = 0o666 & !umask();
        let permissions = <fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(mode);
        aside.as_file().set_permissions(permissions).map_err(failed)?;
        aside.persist(&self.path).map_err(|error| failed(error.error))?;
        Ok(())
    }
}

impl FromStr for Destination {
    type Err = OutputError;

    fn from_str(text: &str) -> Result<Self, OutputError> {
        let path = PathBuf::from(text);
        let format = Format::of_path(&path)?;
        Ok(Self { path, format })
    }
}

/// Details of a profile beside its graph.
#[derive(Clone, Debug, Default)]
pub struct Details {
    /// Heading of the page.
    pub title: String,
    /// Account of the samples.
    pub ledger: Ledger,
    /// Whether flame graphs and folded stacks show the native frames of interpreters.
    pub interpreter_frames: bool,
    /// Whether they leave out frames that say what a stack lacks, such as `[truncated]`.
    pub hide_error_frames: bool,
}

/// Returns the profile in a format.
pub fn render(profile: &Profile, format: Format, details: &Details) -> Result<Vec<u8>, OutputError> {
    match format {
        Format::Pprof => Ok(pprof::encode(profile)),
        Format::Folded => Ok(flame::folded(profile, details)?.into_bytes()),
        Format::Svg => flame::svg(profile, details),
        Format::Html => flame::html(profile, details),
    }
}

/// Returns the umask of this process. Reading it by a system call would change it for other threads for a moment.
fn umask() -> u32 {
    fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| {
            let mask = status.lines().find_map(|line| line.strip_prefix("Umask:"))?;
            u32::from_str_radix(mask.trim(), 8).ok()
        })
        .unwrap_or(0o077)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("a.pb.gz", Format::Pprof)]
    #[case("dir.svg/b.folded", Format::Folded)]
    #[case("A.SVG", Format::Svg)]
    #[case("/tmp/x.y.html", Format::Html)]
    fn the_ending_chooses_the_format(#[case] path: &str, #[case] format: Format) {
        assert_eq!(path.parse::<Destination>().unwrap().format(), format);
    }

    #[rstest]
    #[case("")]
    #[case("a")]
    #[case("a.gz")]
    #[case("a.svg.txt")]
    #[case(".svg")]
    fn an_unknown_ending_names_the_four_that_there_are(#[case] path: &str) {
        let error = path.parse::<Destination>().unwrap_err().to_string();
        for ending in [".pb.gz", ".folded", ".svg", ".html"] {
            assert!(error.contains(ending), "{error}");
        }
    }

    #[test]
    fn the_name_that_is_made_up_is_safe_and_says_when() {
        let now = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_700_000_000);
        let made = Destination::default_for("../kworker/0:1 x", now);
        assert_eq!(made.path(), Path::new("gannet-.._kworker_0_1_x-20231114T221320Z.pb.gz"));
        assert_eq!(Format::of_path(made.path()).unwrap(), made.format());
    }
}
