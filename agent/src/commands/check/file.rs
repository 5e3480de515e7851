//! `check --file`: the agent's view of one program or library, and its unwind table as a text that a user can change.

use std::{
    fmt, fs,
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use clap::Args;
use gannet_elf::{Elf, ElfError};
use gannet_unwind::{
    build::{BuildError, BuildReport, BuiltTable},
    limits::TableLimits,
    overrides::{Overrides, write_text},
};
use serde::Serialize;

use crate::{
    config::default_override_dir,
    model::MappedFile,
    runtimes,
    tables::{SuppliedTables, TableSources, build_table},
};

/// Arguments of `check --file`.
#[derive(Args, Clone, Debug, Default)]
pub struct FileArgs {
    /// Check a program or library instead of the machine: print its content id and what the agent knows of it
    #[arg(long, value_name = "PATH", conflicts_with = "pid")]
    pub(crate) file: Option<PathBuf>,
    /// Write the unwind table of --file as a text that the directory of supplied tables takes
    #[arg(long, value_name = "OUT", requires = "file")]
    pub(crate) write_table: Option<PathBuf>,
    /// Directory of supplied unwind tables [default: /var/lib/gannet/overrides]
    #[arg(long, value_name = "DIR", requires = "file")]
    pub(crate) override_dir: Option<PathBuf>,
}

/// Reasons why a file cannot be checked.
#[derive(Debug, thiserror::Error)]
pub enum FileCheckError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Path as the user gave it.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// It is a directory, a device or a FIFO.
    #[error("{} is no regular file; give a program or a library", .0.display())]
    NoFile(PathBuf),
    /// It is not an ELF file that the agent can read.
    #[error("{}: {fault}; stacks through it are unwound by frame pointer, and its functions have no names", path.display())]
    Elf {
        /// Path as the user gave it.
        path: PathBuf,
        /// Reason why it cannot be read.
        #[source]
        fault: ElfError,
    },
    /// It has no unwind table.
    #[error("{0}; stacks through it are unwound by frame pointer")]
    Build(#[from] BuildError),
    /// The text cannot be written.
    #[error("cannot write {}: {source}; give another file with --write-table", path.display())]
    Write {
        /// Path as the user gave it.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

/// Facts about one file.
#[derive(Clone, Debug, Serialize)]
pub struct FileReport {
    /// Path as given.
    pub path: String,
    /// Name of the file's content, which a supplied table begins with.
    pub content: String,
    /// GNU or Go build id; empty without one.
    pub build_id: String,
    /// Architecture of its code.
    pub arch: String,
    /// The interpreter that it is; empty if it is none.
    pub interpreter: String,
    /// Rows of its unwind table.
    pub rows: u32,
    /// Different rules of these rows.
    pub rules: usize,
    /// Bytes of the table in the kernel.
    pub table_bytes: usize,
    /// Functions by the source of their rules.
    pub functions: Vec<(&'static str, u64)>,
    /// Code that the sources do not describe well, human-readable.
    pub faults: Vec<String>,
    /// Sources of function names, in the order in which the agent uses them.
    pub names: Vec<&'static str>,
    /// The supplied table that takes precedence; empty if there is none.
    pub supplied: String,
    /// Files of the directory that supply no table, with the reasons.
    pub refused: Vec<String>,
    /// The text that was written; empty if none was asked for.
    pub written: String,
}

/// Sections with names of functions.
const NAME_SECTIONS: [(&[u8], &str); 5] = [
    (b".debug_info", "debug information"),
    (b".symtab", "symbol table"),
    (b".gnu_debugdata", "symbol table in .gnu_debugdata"),
    (b".gopclntab", "Go's function table"),
    (b".dynsym", "exported functions"),
];

/// Checks the file that the arguments name. `None` without one.
pub fn check_file(args: &FileArgs) -> Option<Result<FileReport, FileCheckError>> {
    let path = args.file.as_ref()?;
    Some(inspect(path, args))
}

fn inspect(path: &Path, args: &FileArgs) -> Result<FileReport, FileCheckError> {
    let read = |source| FileCheckError::Read { path: path.to_owned(), source };
    let open = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    let open = open.map_err(read)?;
    let metadata = open.metadata().map_err(read)?;
    if !metadata.is_file() {
        return Err(FileCheckError::NoFile(path.to_owned()));
    }
    let limits = TableLimits::default();
    let name = path.display().to_string();
    let elf = Elf::parse(&open, &limits.elf())
        .map_err(|fault| FileCheckError::Elf { path: path.to_owned(), fault })?;
    let theirs = open.try_clone().map_err(read)?;
    let mapped = MappedFile::opened(&name, metadata.dev(), metadata.ino(), theirs);
    let TableSources { debug_dirs, .. } = TableSources::with_debug_files();
    let built = build_table(&mapped, &open, &debug_dirs, &Overrides::default(), &limits)?;
    let directory = args.override_dir.clone().unwrap_or_else(default_override_dir);
    let supplied = SuppliedTables::read(&directory);
    let mut report = describe(name, &elf, &built);
    if let Some((file, _)) = supplied.used.iter().find(|(_, content)| *content == built.content) {
        report.supplied = file.display().to_string();
    }
    report.refused = supplied.refused.iter().map(ToString::to_string).collect();
    if let Some(out) = &args.write_table {
        write_table(out, path, &built)
            .map_err(|source| FileCheckError::Write { path: out.clone(), source })?;
        report.written = out.display().to_string();
    }
    Ok(report)
}

/// Writes the text of a table. An existing file stays: it may hold a user's changes.
fn write_table(out: &Path, path: &Path, built: &BuiltTable) -> io::Result<()> {
    let notes = [
        format!(
            "The unwind table that gannet-agent {} builds for {}.",
            gannet_proto::VERSION,
            path.display()
        ),
        "Correct the rules; docs/troubleshooting.md describes them. The text stands for all of the file."
            .into(),
    ];
    let text = write_text(&built.content, &built.table, &notes);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o644).open(out)?;
    file.write_all(text.as_bytes())
}

fn describe(path: String, elf: &Elf<'_>, built: &BuiltTable) -> FileReport {
    let BuiltTable { table, content, build_id, report, segments: _ } = built;
    let BuildReport {
        eh_frame_functions,
        go_functions,
        debug_frame_functions,
        linkage_ranges,
        signal_trampolines,
        code_functions,
        oddities,
        go_fault,
        unsupported_rows,
        unscanned_bytes,
        overridden: _,
        eh_frame_bytes: _,
    } = *report;
    let mut faults = Vec::new();
    for (count, what) in [
        (oddities.malformed, "entries are malformed"),
        (oddities.dropped, "entries overlap others or lie outside of the code"),
        (unsupported_rows, "rows describe code that no rule can express"),
        (unscanned_bytes, "bytes of code were not searched for signal trampolines"),
    ] {
        if count > 0 {
            faults.push(format!("{count} {what}"));
        }
    }
    faults.extend(go_fault.map(|fault| format!("Go's function table cannot be used: {fault}")));
    let functions = [
        (".eh_frame", eh_frame_functions),
        ("Go's function table", go_functions),
        (".debug_frame", debug_frame_functions),
        ("linkage tables", linkage_ranges),
        ("signal trampolines", signal_trampolines),
        ("instructions", code_functions),
    ];
    let interpreter = runtimes::detect(elf, &path)
        .map_or_else(String::new, |file| format!("{} {}", file.runtime.name(), file.detected.version_text));
    FileReport {
        path,
        content: content.to_string(),
        build_id: build_id.as_ref().map_or_else(String::new, ToString::to_string),
        arch: format!("{:?}", elf.arch()).to_lowercase(),
        interpreter,
        rows: table.rows(),
        rules: table.rules().len(),
        table_bytes: table.kernel_bytes(),
        functions: functions.into_iter().filter(|(_, count)| *count > 0).collect(),
        faults,
        names: NAME_SECTIONS
            .into_iter()
            .filter(|(section, _)| elf.section(section).is_some())
            .map(|(_, name)| name)
            .collect(),
        supplied: String::new(),
        refused: Vec::new(),
        written: String::new(),
    }
}

impl FileReport {
    /// Returns one JSON object with the fields of this structure.
    pub fn to_json(&self) -> String {
        // Texts and numbers always have a JSON form.
        serde_json::to_string_pretty(self).unwrap_or_default()
    }
}

impl fmt::Display for FileReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or_none =
            |text: &str, none: &str| if text.is_empty() { none.to_owned() } else { text.to_owned() };
        let functions: Vec<_> =
            self.functions.iter().map(|(source, count)| format!("{count} of {source}")).collect();
        writeln!(f, "file         {}", self.path)?;
        writeln!(f, "content id   {}", self.content)?;
        writeln!(f, "build id     {}", or_none(&self.build_id, "none"))?;
        writeln!(f, "code         {}", self.arch)?;
        writeln!(
            f,
            "unwind table {} rows, {} rules, {} bytes in the kernel",
            self.rows, self.rules, self.table_bytes
        )?;
        writeln!(
            f,
            "functions    {}",
            or_none(&functions.join(", "), "none: stacks are unwound by frame pointer")
        )?;
        for fault in &self.faults {
            writeln!(f, "             {fault}")?;
        }
        let names = or_none(&self.names.join(", "), "none: frames have the name of the file");
        writeln!(f, "names        {names}")?;
        if !self.interpreter.is_empty() {
            writeln!(f, "interpreter  {}", self.interpreter)?;
        }
        let supplied = if self.supplied.is_empty() {
            "none: the agent uses the table above".to_owned()
        } else {
            format!("{}: it takes precedence over the table above", self.supplied)
        };
        writeln!(f, "supplied     {supplied}")?;
        for refused in &self.refused {
            writeln!(f, "refused      {refused}")?;
        }
        if !self.written.is_empty() {
            writeln!(f, "written      {}", self.written)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use gannet_unwind::{build::identify, overrides::parse_text};

    use super::*;

    /// Checks that a user can write the table of a program, put it into the directory, and sees that it is used.
    #[test]
    fn a_written_table_is_found_for_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let file = PathBuf::from("/proc/self/exe");
        let out = directory.path().join("self.unwind");
        let mut args = FileArgs {
            file: Some(file.clone()),
            write_table: Some(out.clone()),
            override_dir: Some(directory.path().to_owned()),
        };
        let report = check_file(&args).unwrap().unwrap();
        let limits = TableLimits::default();
        let (content, _) = identify(&fs::File::open(&file).unwrap(), "self", &limits).unwrap();
        assert_eq!(report.content, content.to_string());
        assert!(report.supplied.is_empty() && report.rows > 1000, "{report}");
        let (of_text, table) = parse_text(&fs::read_to_string(&out).unwrap(), &limits).unwrap();
        assert_eq!((of_text, table.rows()), (content, report.rows));
        // An existing text stays.
        let error = check_file(&args).unwrap().unwrap_err();
        assert!(error.to_string().contains("--write-table"), "{error}");
        args.write_table = None;
        let report = check_file(&args).unwrap().unwrap();
        assert_eq!(report.supplied, out.display().to_string());
        assert!(report.to_string().contains("takes precedence") && report.to_json().contains("\"content\""));
        fs::write(&out, "content 12").unwrap();
        let report = check_file(&args).unwrap().unwrap();
        assert!(report.supplied.is_empty(), "{report}");
        assert!(report.refused[0].contains("self.unwind: line 1: expected a content id"), "{report}");
    }

    #[test]
    fn a_file_that_is_no_program_is_refused_with_the_reason() {
        let directory = tempfile::tempdir().unwrap();
        let text = directory.path().join("text");
        fs::write(&text, "no program").unwrap();
        let cut = directory.path().join("cut");
        fs::write(&cut, &fs::read("/proc/self/exe").unwrap()[..100]).unwrap();
        for path in [text, cut, directory.path().to_owned(), directory.path().join("nothing")] {
            let args = FileArgs { file: Some(path.clone()), ..FileArgs::default() };
            let error = check_file(&args).unwrap().unwrap_err().to_string();
            assert!(error.contains(path.to_str().unwrap()), "{error}");
        }
        assert!(check_file(&FileArgs::default()).is_none());
    }
}
