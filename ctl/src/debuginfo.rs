//! Debug information at the collector: upload, list, delete.

use std::{fs::File, io::Read as _, path::Path};

use gannet_elf::{Elf, ElfLimits};
use gannet_proto::debuginfo::{
    DebugFile, DeleteDebugInfoRequest, ListDebugInfoRequest, UploadDebugInfoRequest,
    upload_debug_info_request::{Begin, Message},
};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use tonic::Code;

use crate::{
    args::{DebugInfo, Format},
    client::Collector,
    error::Error,
    render::{Console, bytes, clean, count, millis, show_time, table},
};

/// Maximum size of one message, in bytes.
const CHUNK_BYTES: usize = 256 << 10;

/// Runs one of the commands.
pub(crate) async fn run(
    command: DebugInfo,
    collector: &Collector,
    format: Format,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    match command {
        DebugInfo::Upload { files } => upload(&files, collector, format, console).await,
        DebugInfo::List => list(collector, format, console).await,
        DebugInfo::Delete { build_ids } => delete(&build_ids, collector, format, console).await,
    }
}

/// The outcome of the upload of one file.
struct Uploaded {
    file: String,
    build_id: String,
    bytes: u64,
    /// The collector already has the file.
    is_known: bool,
}

async fn upload(
    files: &[std::path::PathBuf],
    collector: &Collector,
    format: Format,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    let mut done = Vec::new();
    let mut failed = Vec::new();
    for file in files {
        match upload_one(file, collector).await {
            Ok(uploaded) => done.push(uploaded),
            Err(error) => failed.push(format!("{}: {error}", file.display())),
        }
    }
    console.show(
        format,
        || {
            let file = |Uploaded { file, build_id, bytes, is_known }: &Uploaded| {
                json!({ "file": file, "build_id": build_id, "bytes": bytes, "known": is_known })
            };
            json!({ "files": done.iter().map(file).collect::<Vec<_>>() })
        },
        || {
            let line = |Uploaded { file, build_id, bytes: size, is_known }: &Uploaded| {
                let what = if *is_known { "the collector already has it".to_owned() } else { format!("uploaded {}", bytes(*size)) };
                format!("{}: build id {build_id}: {what}\n", clean(file))
            };
            done.iter().map(line).collect()
        },
    )?;
    if failed.is_empty() { Ok(()) } else { Err(Error::Failed(failed.join("\n"))) }
}

async fn upload_one(path: &Path, collector: &Collector) -> Result<Uploaded, Error> {
    let name = path.display().to_string();
    let fault = |source| Error::File { file: name.clone(), source };
    let file = File::open(path).map_err(fault)?;
    let metadata = file.metadata().map_err(fault)?;
    let elf = Elf::parse(&file, &ElfLimits::default());
    let build_id = elf.map_err(|error| Error::Failed(error.to_string()))?.build_id().map(ToString::to_string);
    let Some(build_id) = build_id else {
        return Err(Error::Failed(
            "the file has no GNU build id; link the program with `-Wl,--build-id` (Go: `-ldflags=-B=gobuildid`)".to_owned(),
        ));
    };
    let size = metadata.len();
    let uploaded =
        |is_known| Uploaded { file: name.clone(), build_id: build_id.clone(), bytes: size, is_known };
    let begin = Begin { build_id: build_id.clone(), bytes: size };
    let answer = collector.debug_info().upload_debug_info(messages(begin, file)).await;
    match answer {
        Ok(_) => Ok(uploaded(false)),
        Err(status) if status.code() == Code::AlreadyExists => Ok(uploaded(true)),
        Err(status) => Err(collector.fault(&status)),
    }
}

/// Returns the messages of an upload. The stream reads the file piece by piece. If it cannot read the file, it ends early, and the
/// collector refuses the upload.
fn messages(
    begin: Begin,
    file: File,
) -> impl tonic::codegen::tokio_stream::Stream<Item = UploadDebugInfoRequest> + Send {
    let bar = ProgressBar::new(begin.bytes).with_style(style());
    let message = |message| UploadDebugInfoRequest { message: Some(message) };
    let mut reader = file.take(begin.bytes);
    let chunks = std::iter::from_fn(move || {
        let mut chunk = vec![0; CHUNK_BYTES];
        let read = reader.read(&mut chunk).ok().filter(|read| *read > 0);
        let Some(read) = read else {
            bar.finish_and_clear();
            return None;
        };
        chunk.truncate(read);
        bar.inc(read as u64);
        Some(Message::Data(chunk))
    });
    tonic::codegen::tokio_stream::iter(std::iter::once(Message::Begin(begin)).chain(chunks).map(message))
}

async fn list(collector: &Collector, format: Format, console: &mut Console<'_>) -> Result<(), Error> {
    let answer = collector.debug_info().list_debug_info(ListDebugInfoRequest {}).await;
    let answer = answer.map_err(|status| collector.fault(&status))?.into_inner();
    console.show(
        format,
        || {
            json!({
                "files": answer.files.iter().map(file_json).collect::<Vec<_>>(), "bytes": answer.bytes,
                "max_bytes": answer.max_bytes,
            })
        },
        || {
            if answer.files.is_empty() {
                return "the collector has no debug information; upload some with `gannetctl debuginfo upload FILE`\n".to_owned();
            }
            let rows: Vec<_> = answer.files.iter().map(row).collect();
            let of = format!(
                "{} with {}, the limit is {}\n",
                count(rows.len(), "file"),
                bytes(answer.bytes),
                bytes(answer.max_bytes)
            );
            table(["BUILD ID", ">SIZE", "FROM", "STORED"], &rows) + &of
        },
    )
}

fn row(file: &DebugFile) -> [String; 4] {
    [file.build_id.clone(), bytes(file.bytes), file.origin.clone(), show_time(file.stored)]
}

fn file_json(file: &DebugFile) -> Value {
    json!({
        "build_id": file.build_id, "bytes": file.bytes, "origin": file.origin, "stored_ms": millis(file.stored),
    })
}

async fn delete(
    build_ids: &[String],
    collector: &Collector,
    format: Format,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    for build_id in build_ids {
        let request = DeleteDebugInfoRequest { build_id: build_id.clone() };
        let answer = collector.debug_info().delete_debug_info(request).await;
        answer.map_err(|status| collector.fault(&status))?;
    }
    console.show(format, || json!({ "deleted": build_ids }), || format!("deleted {}\n", build_ids.join(", ")))
}

fn style() -> ProgressStyle {
    ProgressStyle::with_template("uploading {wide_bar} {bytes}/{total_bytes} {eta}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}
