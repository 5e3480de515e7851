//! Reads requests of OTLP as pprof profiles with labels.

use std::collections::BTreeMap;

use gannet_proto::{
    labels::{self, Labels},
    pprof::{Merger, Profile},
    profiles::{Label, Sample, ValueType},
};
use opentelemetry_proto::tonic::{
    collector::profiles::v1development::ExportProfilesServiceRequest, common::v1::InstrumentationScope,
    profiles::v1development as otlp, resource::v1::Resource,
};
use ulid::Ulid;

use super::{
    OtlpError, SCOPE, attributes, content_id,
    dictionary::{Dictionary, Scalar},
    tables::{Budget, Tables},
};

/// Name of a service that names itself nowhere: that of the semantic conventions.
const UNKNOWN_SERVICE: &str = "unknown_service";
/// Attributes of a resource that become labels of samples instead of series, because each process or thread has its own values.
const OF_SAMPLES: [&str; 5] = ["container_id", "pid", "pod_uid", "thread", "tid"];

/// A profile of a request.
pub struct Incoming {
    /// The same for a request that is sent again.
    pub id: Ulid,
    /// Labels of the series.
    pub labels: Labels,
    /// The profile; not checked yet.
    pub profile: Profile,
    /// Number of OTLP profiles that it was made from.
    pub parts: u64,
}

/// The profiles of a request.
#[derive(Default)]
pub struct Decoded {
    /// Those that can be read.
    pub profiles: Vec<Incoming>,
    /// Number of OTLP profiles that cannot be read.
    pub rejected: u64,
    /// The fault of the first of them.
    pub error: Option<OtlpError>,
}

impl Decoded {
    fn reject(&mut self, profiles: u64, error: OtlpError) {
        self.rejected += profiles;
        self.error.get_or_insert(error);
    }
}

/// Reads a request. A profile that cannot be read leaves the others as they are.
pub fn decode(request: ExportProfilesServiceRequest) -> Result<Decoded, OtlpError> {
    let ExportProfilesServiceRequest { resource_profiles, dictionary } = request;
    let dictionary = Dictionary::new(dictionary.unwrap_or_default())?;
    let (mut decoded, mut budget, mut foreign) = (Decoded::default(), Budget::new(), Series::default());
    for otlp::ResourceProfiles { resource, scope_profiles, .. } in resource_profiles {
        let origin = Origin::of(&dictionary, &resource.unwrap_or_default());
        for otlp::ScopeProfiles { scope, profiles, .. } in scope_profiles {
            let scope = scope.unwrap_or_default();
            let default_type = text_attribute(&dictionary, &scope, attributes::DEFAULT_SAMPLE_TYPE);
            let (origin, default_type) = match (&origin, default_type) {
                (Ok(origin), Ok(default_type)) => (origin, default_type),
                (Err(error), _) => {
                    decoded.reject(profiles.len() as u64, error.clone());
                    continue;
                }
                (_, Err(error)) => {
                    decoded.reject(profiles.len() as u64, error);
                    continue;
                }
            };
            for group in groups(&profiles) {
                let parts = group.len() as u64;
                match read_group(&dictionary, group, origin, &default_type, &mut budget) {
                    Err(error @ OtlpError::TooLarge { .. }) => return Err(error),
                    Err(error) => decoded.reject(parts, error),
                    Ok(profile) if scope.name == SCOPE => decoded.profiles.push(Incoming {
                        id: own_id(group).unwrap_or_else(|| content_id(&origin.labels, &profile)),
                        labels: origin.labels.clone(),
                        profile,
                        parts,
                    }),
                    Ok(profile) => foreign.add(&origin.labels, widened(profile), parts),
                }
            }
        }
    }
    foreign.finish(&mut decoded);
    Ok(decoded)
}

/// Profiles of other senders, by their series and time. OpenTelemetry's profiler sends a resource for each process.
#[derive(Default)]
struct Series(BTreeMap<SeriesKey, (Vec<Profile>, u64)>);

/// Labels, start, duration and sample types.
type SeriesKey = (Labels, i64, i64, Vec<String>);

impl Series {
    fn add(&mut self, labels: &Labels, profile: Profile, parts: u64) {
        let text = |index: i64| profile.string_table.get(index as usize).cloned().unwrap_or_default();
        let types = profile.sample_type.iter().chain(&profile.period_type);
        let types = types.map(|kind| format!("{}/{}", text(kind.r#type), text(kind.unit))).collect();
        let key = (labels.clone(), profile.time_nanos, profile.duration_nanos, types);
        let entry = self.0.entry(key).or_default();
        entry.0.push(profile);
        entry.1 += parts;
    }

    fn finish(self, decoded: &mut Decoded) {
        for ((labels, ..), (profiles, parts)) in self.0 {
            match merged(profiles) {
                Ok(profile) => {
                    let id = content_id(&labels, &profile);
                    decoded.profiles.push(Incoming { id, labels, profile, parts });
                }
                Err(error) => decoded.reject(parts, OtlpError::Profile(error)),
            }
        }
    }
}

fn merged(mut profiles: Vec<Profile>) -> Result<Profile, gannet_proto::pprof::PprofError> {
    if profiles.len() < 2 {
        return Ok(profiles.pop().unwrap_or_default());
    }
    let mut merger = Merger::new();
    for profile in &profiles {
        merger.add(profile)?;
    }
    Ok(merger.finish().unwrap_or_default())
}

/// The id of a profile that Gannet sent: that of its batch.
fn own_id(group: &[otlp::Profile]) -> Option<Ulid> {
    let bytes: [u8; 16] = group.first()?.profile_id.as_slice().try_into().ok()?;
    (bytes != [0; 16]).then(|| Ulid::from_bytes(bytes))
}

fn text_attribute(
    dictionary: &Dictionary,
    scope: &InstrumentationScope,
    name: &str,
) -> Result<String, OtlpError> {
    for attribute in &scope.attributes {
        let (key, value) = dictionary.key_value(attribute)?;
        if key == name {
            return Ok(value.into_text());
        }
    }
    Ok(String::new())
}

/// The properties of a resource that its profiles share.
struct Origin {
    /// Labels of the series.
    labels: Labels,
    /// Labels of each sample.
    of_samples: Vec<(&'static str, String)>,
}

impl Origin {
    /// Reads the attributes of a resource. Those that are no valid labels, and those that would make a series for each process,
    /// are left out.
    fn of(dictionary: &Dictionary, resource: &Resource) -> Result<Self, OtlpError> {
        let mut origin = Self { labels: Labels::new(), of_samples: Vec::new() };
        let mut others = Labels::new();
        for attribute in &resource.attributes {
            let (key, value) = dictionary.key_value(attribute)?;
            origin.add(key, value, &mut others);
        }
        for (name, value) in others {
            if origin.labels.len() < labels::MAX_LABELS - 1 {
                origin.labels.entry(name).or_insert(value);
            }
        }
        if !origin.labels.contains_key(labels::SERVICE_NAME) {
            let command = origin.labels.get(labels::COMM).cloned();
            origin.labels.insert(
                labels::SERVICE_NAME.to_owned(),
                command.unwrap_or_else(|| UNKNOWN_SERVICE.to_owned()),
            );
        }
        Ok(origin)
    }

    /// `others` takes what may be left out if there are too many labels.
    fn add(&mut self, key: &str, value: Scalar<'_>, others: &mut Labels) {
        let name = attributes::label(key);
        let mut value = value.into_text();
        value.truncate(gannet_base::head(&value, labels::MAX_VALUE_BYTES).len());
        if let Some(name) = OF_SAMPLES.into_iter().find(|of| *of == name) {
            self.of_samples.push((name, value));
        } else if let Some(kind) = attributes::workload_kind(key) {
            self.labels.insert(labels::WORKLOAD.to_owned(), value);
            self.labels.insert(labels::WORKLOAD_KIND.to_owned(), kind.to_owned());
        } else if name != key || labels::RESERVED.contains(&name) {
            self.labels.insert(name.to_owned(), value);
        } else if key == "host.name" {
            others.insert(labels::NODE.to_owned(), value);
        } else if !key.starts_with("process.") && !key.is_empty() {
            others.insert(labels::safe_name(key), value);
        }
    }
}

/// Returns the OTLP profiles that are the sample types of one: neighbours with the same time and samples.
fn groups(profiles: &[otlp::Profile]) -> impl Iterator<Item = &[otlp::Profile]> {
    profiles.chunk_by(|first, second| {
        let is_same = |first: &otlp::Sample, second: &otlp::Sample| {
            first.stack_index == second.stack_index
                && first.attribute_indices == second.attribute_indices
                && first.link_index == second.link_index
                && first.timestamps_unix_nano.is_empty()
                && second.timestamps_unix_nano.is_empty()
        };
        first.sample_type != second.sample_type
            && first.time_unix_nano == second.time_unix_nano
            && first.duration_nano == second.duration_nano
            && first.period_type == second.period_type
            && first.period == second.period
            && first.attribute_indices == second.attribute_indices
            && first.samples.len() == second.samples.len()
            && first.samples.iter().zip(&second.samples).all(|(first, second)| is_same(first, second))
    })
}

/// Makes one pprof profile of a group.
fn read_group(
    dictionary: &Dictionary,
    group: &[otlp::Profile],
    origin: &Origin,
    default_type: &str,
    budget: &mut Budget,
) -> Result<Profile, OtlpError> {
    let Some(first) = group.first() else { return Ok(Profile::default()) };
    let mut tables = Tables::new(dictionary);
    let mut profile = Profile {
        time_nanos: i64::try_from(first.time_unix_nano).map_err(|_| OtlpError::Time)?,
        duration_nanos: i64::try_from(first.duration_nano).map_err(|_| OtlpError::Time)?,
        period: first.period,
        ..Profile::default()
    };
    for part in group {
        let sample_type = part.sample_type.ok_or(OtlpError::NoSampleType)?;
        profile.sample_type.push(tables.value_type(sample_type, budget)?);
    }
    if let Some(period_type) = first.period_type {
        profile.period_type = Some(tables.value_type(period_type, budget)?);
    }
    profile.default_sample_type = tables.text(default_type, budget)?;
    for attribute in &first.attribute_indices {
        match dictionary.attribute(*attribute)?.0 {
            attributes::COMMENT => {
                for text in dictionary.texts(*attribute)? {
                    profile.comment.push(tables.text(&text, budget)?);
                }
            }
            key @ (attributes::DROP_FRAMES | attributes::KEEP_FRAMES | attributes::DOC_URL) => {
                let text = dictionary.attribute(*attribute)?.1.into_text();
                let index = tables.text(&text, budget)?;
                *match key {
                    attributes::DROP_FRAMES => &mut profile.drop_frames,
                    attributes::KEEP_FRAMES => &mut profile.keep_frames,
                    _ => &mut profile.doc_url,
                } = index;
            }
            _ => {}
        }
    }
    for (number, sample) in first.samples.iter().enumerate() {
        let mut value = Vec::with_capacity(group.len());
        for part in group {
            value.push(value_of(number, &part.samples[number])?);
        }
        let label = labels_of(&mut tables, sample, origin, budget)?;
        budget.spend(size_of::<Sample>() + size_of_val(value.as_slice()))?;
        let location_id = tables.stack(sample.stack_index, budget)?;
        profile.sample.push(Sample { location_id, value, label });
    }
    tables.fill(&mut profile);
    Ok(profile)
}

/// Returns the value of a sample. A sample with times only has 1 for each.
fn value_of(number: usize, sample: &otlp::Sample) -> Result<i64, OtlpError> {
    let (values, times) = (sample.values.len(), sample.timestamps_unix_nano.len());
    match (values, times) {
        // Field numbers of 1.9: its values arrive as indexes of attributes.
        (0, 0) => Err(OtlpError::NoValue { sample: number }),
        (0, times) => Ok(times as i64),
        (1, 0) => Ok(sample.values[0]),
        (values, times) if values == times || times == 0 => {
            Ok(sample.values.iter().fold(0_i64, |sum, value| sum.saturating_add(*value)))
        }
        _ => Err(OtlpError::Shape { sample: number, values, times }),
    }
}

fn labels_of(
    tables: &mut Tables<'_>,
    sample: &otlp::Sample,
    origin: &Origin,
    budget: &mut Budget,
) -> Result<Vec<Label>, OtlpError> {
    let mut all: Vec<Label> = Vec::with_capacity(sample.attribute_indices.len() + origin.of_samples.len());
    for index in &sample.attribute_indices {
        let label = tables.label(*index, budget)?;
        // Two attributes may be the same label: `thread` and `thread.name`.
        if !all.iter().any(|have| have.key == label.key) {
            all.push(label);
        }
    }
    let link = tables.link(sample.link_index)?;
    let ids = link.into_iter().flat_map(|link| {
        [(attributes::TRACE_ID, &link.trace_id), (attributes::SPAN_ID, &link.span_id)]
            .map(|(name, id)| (name, gannet_base::hex(id)))
    });
    for (name, text) in ids.chain(origin.of_samples.iter().map(|(name, text)| (*name, text.clone()))) {
        let label = match text.parse() {
            Ok(number) if ["pid", "tid"].contains(&name) => tables.number_label(name, number, budget)?,
            _ => tables.text_label(name, &text, budget)?,
        };
        if !text.is_empty() && !all.iter().any(|have| have.key == label.key) {
            all.push(label);
        }
    }
    Ok(all)
}

/// Returns the profile of another sender with the sample types of Gannet's own, so that both show together: samples of the CPU with their
/// time, intervals off the CPU with their number.
fn widened(mut profile: Profile) -> Profile {
    let name = |profile: &Profile, of: Option<&ValueType>| {
        let text = |index: i64| {
            usize::try_from(index).ok().and_then(|at| profile.string_table.get(at)).map_or("", String::as_str)
        };
        of.map(|of| format!("{}/{}", text(of.r#type), text(of.unit))).unwrap_or_default()
    };
    let [only] = profile.sample_type[..] else { return profile };
    let (kind, period) = (name(&profile, Some(&only)), name(&profile, profile.period_type.as_ref()));
    match (kind.as_str(), period.as_str()) {
        ("samples/count", "cpu/nanoseconds") if profile.period > 0 => {
            profile.sample_type.extend(profile.period_type);
            for sample in &mut profile.sample {
                let time = sample.value.first().map_or(0, |count| count.saturating_mul(profile.period));
                sample.value.push(time);
            }
        }
        ("off_cpu/nanoseconds" | "offcpu/nanoseconds", _) => {
            let mut text = |text: &str| {
                profile.string_table.push(text.to_owned());
                profile.string_table.len() as i64 - 1
            };
            let events = ValueType { r#type: text("events"), unit: text("count") };
            let time = ValueType { r#type: text("offcpu"), unit: only.unit };
            profile.sample_type = vec![events, time];
            profile.period_type = Some(time);
            for sample in &mut profile.sample {
                sample.value.insert(0, 1);
            }
        }
        _ => {}
    }
    profile
}
