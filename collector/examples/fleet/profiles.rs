//! Encoded profiles to send: variations of recorded ones, made ones, and the smallest one.

use std::{fs, path::Path};

use anyhow::Context as _;
use gannet_proto::pprof::{Builder, Encoding, Header, Merger, Profile, decode, encode, encode_as};
use prost::Message as _;

use super::made::Random;

/// An encoded profile with the number of its samples.
#[derive(Clone)]
pub(crate) struct Encoded {
    pub(crate) pprof: Vec<u8>,
    pub(crate) samples: u64,
}

/// Returns the profiles in the files of a directory, merged into one, and the mean number of samples of a file.
fn recorded(dir: &Path) -> anyhow::Result<(Profile, u64)> {
    let mut merger = Merger::new();
    let (mut samples, mut files) = (0, 0);
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        let profile = decode(&fs::read(&path)?, 64 << 20).with_context(|| path.display().to_string())?;
        samples += gannet_proto::pprof::samples(&profile);
        files += 1;
        merger.add(&profile)?;
    }
    let merged = merger.finish().with_context(|| format!("no profiles in {}", dir.display()))?;
    Ok((merged, samples / files))
}

/// Returns profiles that differ as the windows of a program do: each draws its samples from those of all recorded windows.
pub(crate) fn variations(dir: &Path, number: usize, random: &mut Random) -> anyhow::Result<Vec<Encoded>> {
    let (all, samples) = recorded(dir)?;
    let mut ends = Vec::with_capacity(all.sample.len());
    let mut total = 0;
    for sample in &all.sample {
        total += sample.value.first().copied().unwrap_or(0).max(0) as u64;
        ends.push(total);
    }
    anyhow::ensure!(total > 0, "the profiles in {} have no samples", dir.display());
    let mut variation = || {
        let mut counts = vec![0_i64; all.sample.len()];
        for _ in 0..samples {
            let drawn = random.below(total);
            counts[ends.partition_point(|end| *end <= drawn)] += 1;
        }
        let mut drawn = all.clone();
        drawn.duration_nanos = 10_000_000_000;
        drawn.sample.clear();
        for (sample, count) in all.sample.iter().zip(counts).filter(|(_, count)| *count > 0) {
            let mut sample = sample.clone();
            let before = sample.value[0];
            for value in &mut sample.value {
                *value = *value / before * count;
            }
            drawn.sample.push(sample);
        }
        // Without the locations that no sample has.
        let mut merger = Merger::new();
        merger.add(&drawn)?;
        let profile = merger.finish().context("no samples")?;
        Ok(Encoded { pprof: encode(&profile), samples })
    };
    (0..number).map(|_| variation()).collect()
}

/// Encodes made profiles. `None`: without compression.
pub(crate) fn encoded(profiles: &[(Profile, u64)], encoding: Option<Encoding>) -> Vec<Encoded> {
    let encoded = |(profile, samples): &(Profile, u64)| {
        let pprof = encoding.map_or_else(|| profile.encode_to_vec(), |encoding| encode_as(profile, encoding));
        Encoded { pprof, samples: *samples }
    };
    profiles.iter().map(encoded).collect()
}

/// Returns a profile of one sample, the smallest that a collector takes.
pub(crate) fn smallest() -> Encoded {
    let types = [("samples", "count"), ("cpu", "nanoseconds")];
    let mut builder = Builder::new(Header {
        sample_types: &types,
        period_type: types[1],
        period: 10_000_000,
        time_nanos: 0,
        duration_nanos: 10_000_000_000,
    });
    let location = builder.location(None, 0x1000, &[]);
    builder.sample(&[location], &[1, 10_000_000], &[]);
    Encoded { pprof: encode(&builder.finish()), samples: 1 }
}
