//! The names in the path of a control group: container, pod, systemd unit.

/// Enclosing containers to keep of one path. More than two are unusual.
const MAX_OUTER: usize = 4;

/// The names in the path of a control group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CgroupNames {
    /// The runtime's id of the innermost container, for most runtimes 64 hex digits; empty for a process outside of
    /// containers.
    pub container_id: String,
    /// With dashes, or the 32 hex digits of a static pod; empty if the path names no pod.
    pub pod_uid: String,
    /// The starter of a process outside of containers: its systemd unit (`ssh.service`), an LXC container
    /// (`lxc.payload.web`), a service of Talos (`podruntime/kubelet`).
    pub unit: String,
    /// The containers around the innermost one, the outermost first: of Docker in a pod the pod's own container.
    pub outer: Vec<PathContainer>,
}

/// One of several nested containers in a path.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PathContainer {
    /// The runtime's id.
    pub id: String,
    /// The uid of the pod before it in the path; empty without one.
    pub pod_uid: String,
}

impl CgroupNames {
    /// Parses a path below the hierarchy's root. Of nested containers the innermost gives the id.
    pub fn of(path: &str) -> Self {
        let mut names = Self::default();
        let mut parent = "";
        let mut in_garden = false;
        // The uid before the container in the path.
        let mut uid_of_container = String::new();
        for component in path.split('/') {
            if let Some(id) = container_id(component).or_else(|| other_id(parent, in_garden, component)) {
                let outer = std::mem::replace(&mut names.container_id, id.to_owned());
                if !outer.is_empty() && names.outer.len() < MAX_OUTER {
                    names
                        .outer
                        .push(PathContainer { id: outer, pod_uid: std::mem::take(&mut uid_of_container) });
                }
                uid_of_container.clone_from(&names.pod_uid);
            }
            parent = component;
            in_garden |= component == "garden";
            if let Some(uid) = pod_uid(component) {
                names.pod_uid = uid;
            }
            if [".service", ".scope"].iter().any(|kind| component.ends_with(kind)) {
                names.unit = unescape(component);
            }
            // LXC makes this group for a container, which has no id but its name.
            if component.starts_with("lxc.payload.") {
                component.clone_into(&mut names.unit);
            }
        }
        // Talos has no systemd. The groups of its services are one level below this one.
        if let Some(unit) = path.strip_prefix("/podruntime/") {
            names.unit = format!("podruntime/{}", unit.split('/').next().unwrap_or_default());
        }
        if !names.container_id.is_empty() {
            names.unit.clear();
        }
        names
    }

    /// Returns ids and pod uids of all containers in the path, the outermost first.
    pub(crate) fn containers(&self) -> Vec<(&str, &str)> {
        containers(&self.outer, &self.container_id, &self.pod_uid)
    }
}

/// Returns ids and pod uids of nested containers, the outermost first; nothing without an innermost one.
pub(crate) fn containers<'a>(
    outer: &'a [PathContainer],
    id: &'a str,
    pod_uid: &'a str,
) -> Vec<(&'a str, &'a str)> {
    let outer = outer.iter().map(|container| (container.id.as_str(), container.pod_uid.as_str()));
    outer.chain([(id, pod_uid)]).filter(|(id, _)| !id.is_empty()).collect()
}

/// Returns the id of a container whose runtime uses no 64 hex digits.
fn other_id<'a>(parent: &str, in_garden: bool, component: &'a str) -> Option<&'a str> {
    let is_hex = |text: &str| text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    // BuildKit: a number in base 36.
    let buildkit = || {
        parent == "buildkit"
            && component.len() == 25
            && component.bytes().all(|byte| byte.is_ascii_digit() || byte.is_ascii_lowercase())
    };
    // Fargate repeats the id of the task and adds a number: `TASK/TASK-123`.
    let fargate = || {
        let number = component.strip_prefix(parent).and_then(|rest| rest.strip_prefix('-'));
        parent.len() == 32
            && is_hex(parent)
            && number.is_some_and(|number| {
                (1..=20).contains(&number.len()) && number.bytes().all(|byte| byte.is_ascii_digit())
            })
    };
    // Cloud Foundry below `garden` and Mesos: a UUID. Garden's own has a last part of four digits.
    let uuid = || {
        let lengths: Vec<usize> = component.split('-').map(str::len).take(6).collect();
        let is_uuid = lengths == [8, 4, 4, 4, 12] || (in_garden && lengths == [8, 4, 4, 4, 4]);
        is_uuid && component.split('-').all(is_hex)
    };
    (buildkit() || fargate() || ((in_garden || parent == "mesos") && uuid())).then_some(component)
}

/// `…-ID.scope`, `…:ID`, `kata_ID`, `ID`; not CRI-O's monitor of a container.
fn container_id(component: &str) -> Option<&str> {
    let stem = component.strip_suffix(".scope").unwrap_or(component);
    let (prefix, id) = stem.split_at_checked(stem.len().checked_sub(64)?)?;
    let is_id = id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let stands_alone = prefix.is_empty() || prefix.ends_with(['-', ':', '_']);
    (is_id && stands_alone && !prefix.contains("conmon")).then_some(id)
}

/// `podUID`, `…-podU_U_U.slice`: the last one of the component.
fn pod_uid(component: &str) -> Option<String> {
    component.rmatch_indices("pod").find_map(|(at, _)| {
        let rest = &component[at + 3..];
        let end = rest.find(|c: char| !matches!(c, '0'..='9' | 'a'..='f' | '-' | '_')).unwrap_or(rest.len());
        (32..=36).contains(&end).then(|| rest[..end].replace('_', "-"))
    })
}

/// systemd writes `-` and other bytes within a name as `\x2d`.
fn unescape(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    let mut rest = name;
    while let Some(at) = rest.find("\\x") {
        out.push_str(&rest[..at]);
        let byte =
            rest.get(at + 2..at + 4).and_then(|hex| u8::from_str_radix(hex, 16).ok()).filter(u8::is_ascii);
        let Some(byte) = byte else {
            out.push_str("\\x");
            rest = &rest[at + 2..];
            continue;
        };
        out.push(byte.into());
        rest = &rest[at + 4..];
    }
    out + rest
}

/// Returns the part of a process's path that names its container; the complete path if none does.
pub(crate) fn container_part(path: &str) -> &str {
    part(path, |names| &names.container_id)
}

/// Returns the part of a process's path that names its pod, else the part of its container.
pub(crate) fn pod_part(path: &str) -> &str {
    if CgroupNames::of(path).pod_uid.is_empty() {
        return container_part(path);
    }
    part(path, |names| &names.pod_uid)
}

/// Returns the shortest beginning of a path that has the same name as the complete path; the path itself if it has none.
fn part(path: &str, name: impl Fn(&CgroupNames) -> &str) -> &str {
    let names = CgroupNames::of(path);
    if name(&names).is_empty() {
        return path;
    }
    path.match_indices('/')
        .map(|(at, _)| &path[..at])
        .chain([path])
        .find(|beginning| name(&CgroupNames::of(beginning)) == name(&names))
        .unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const I: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    const UID: &str = "12345678-9abc-def0-1234-56789abcdef0";
    const HASH: &str = "0123456789abcdef0123456789abcdef";

    /// `I`, `J` stand for container ids, `U` for the pod's uid, `U_` for the same with underscores, `H` for the hash of a
    /// static pod.
    #[rstest]
    #[case::f01_containerd_systemd(
        "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podU_.slice/cri-containerd-I.scope",
        Some(UID)
    )]
    #[case::f02_guaranteed("/kubepods.slice/kubepods-podU_.slice/cri-containerd-I.scope", Some(UID))]
    #[case::f03_containerd_cgroupfs("/kubepods/besteffort/podU/I", Some(UID))]
    #[case::f04_guaranteed_cgroupfs("/kubepods/podU/I", Some(UID))]
    #[case::f05_static_pod("/kubepods/burstable/podH/I", Some(HASH))]
    #[case::f05_static_pod_systemd(
        "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podH.slice/cri-containerd-I.scope",
        Some(HASH)
    )]
    #[case::f06_mixed_drivers(
        "/system.slice/containerd.service/kubepods-burstable-podU_.slice:cri-containerd:I",
        Some(UID)
    )]
    #[case::f07_crio(
        "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podU_.slice/crio-I.scope",
        Some(UID)
    )]
    #[case::f08_crio_crun_below(
        "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podU_.slice/crio-I.scope/container",
        Some(UID)
    )]
    #[case::f09_crio_cgroupfs("/kubepods/besteffort/podU/crio-I", Some(UID))]
    #[case::f11_docker_systemd(
        "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podU_.slice/docker-I.scope",
        Some(UID)
    )]
    #[case::f12_docker_cgroupfs("/kubepods/besteffort/podU/I", Some(UID))]
    #[case::f13_made_inside("/kubepods/besteffort/podU/I/kube-proxy", Some(UID))]
    #[case::f14_systemd_inside(
        "/kubepods.slice/kubepods-podU_.slice/cri-containerd-I.scope/init.scope",
        Some(UID)
    )]
    #[case::f14_unit_inside(
        "/kubepods.slice/kubepods-podU_.slice/cri-containerd-I.scope/system.slice/x.service",
        Some(UID)
    )]
    #[case::f15_private_namespace("/../../kubepods-besteffort-podU_.slice/cri-containerd-I.scope", Some(UID))]
    #[case::f16_nested("/system.slice/docker-J.scope/kubelet/kubepods/burstable/podU/I", Some(UID))]
    #[case::f17_kind_systemd(
        "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/\
         kubelet-kubepods-burstable-podU_.slice/cri-containerd-I.scope",
        Some(UID)
    )]
    #[case::f18_plain_docker("/system.slice/docker-I.scope", None)]
    #[case::f19_plain_docker_cgroupfs("/docker/I", None)]
    #[case::f20_podman("/machine.slice/libpod-I.scope/container", None)]
    #[case::docker_in_a_pod("/kubepods/podU/J/docker/I", Some(UID))]
    #[case::podman_split_by_systemd("/system.slice/web.service/libpod-payload-I", None)]
    #[case::podman_without_root(
        "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-I.scope/container",
        None
    )]
    #[case::podman_pod("/machine.slice/machine-libpod_pod_J.slice/libpod-I.scope", None)]
    #[case::ecs_on_ec2("/ecs.slice/ecstasks-H.slice/docker-I.scope", None)]
    #[case::ecs_cgroupfs("/ecs/H/I", None)]
    #[case::nomad_docker("/nomad.slice/share.slice/docker-I.scope", None)]
    #[case::kata("/kubepods/podU/kata_I", Some(UID))]
    #[case::talos("/kubepods/burstable/podU/I", Some(UID))]
    fn a_container_is_known_by_its_path(#[case] form: &str, #[case] uid: Option<&str>) {
        let names = CgroupNames::of(&written_out(form));
        assert_eq!(names.container_id, I);
        assert_eq!(names.pod_uid, uid.unwrap_or_default());
        assert_eq!(names.unit, "");
    }

    #[rstest]
    #[case::f10_conmon("/kubepods.slice/kubepods-besteffort-podU_.slice/crio-conmon-I.scope")]
    #[case::podman_conmon("/machine.slice/libpod-conmon-I.scope")]
    #[case::pod_itself("/kubepods/burstable/podU")]
    #[case::too_long("/docker/aI")]
    #[case::upper_case("/docker/0123456789ABCDEF0123456789abcdef0123456789abcdef0123456789abcdef")]
    #[case::short("/docker/0123456789ab")]
    #[case::no_buildkit("/docker/xmnsy62tgqiaaq6gdkbcurhl9")]
    #[case::short_buildkit("/docker/buildkit/xmnsy62tgqiaaq6gdkbcurhl")]
    #[case::other_task("/ecs/H/0123456789abcdef0123456789abcdee-123")]
    #[case::no_number("/ecs/H/H-12x")]
    #[case::no_garden("/web/6f265890-5165-7fab-6b52-18d1")]
    #[case::nomad_task("/nomad.slice/share.slice/6f265890-5165-7fab-6b52-18d112345678.web.scope")]
    #[case::podman_pod_itself("/machine.slice/machine-libpod_pod_I.slice")]
    fn what_is_no_container_is_none(#[case] form: &str) {
        assert_eq!(CgroupNames::of(&written_out(form)).container_id, "");
    }

    #[rstest]
    #[case::unit("/system.slice/ssh.service", "ssh.service")]
    #[case::session("/user.slice/user-0.slice/session-1.scope", "session-1.scope")]
    #[case::escaped(r"/system.slice/system-getty.slice/getty\x2dtty1.service", "getty-tty1.service")]
    #[case::no_escape(r"/x\xzz.service", r"x\xzz.service")]
    #[case::delegated("/system.slice/x.service/worker", "x.service")]
    #[case::talos_kubelet("/podruntime/kubelet", "podruntime/kubelet")]
    #[case::talos_runtime("/podruntime/runtime/below", "podruntime/runtime")]
    #[case::lxc("/lxc.payload.web", "lxc.payload.web")]
    #[case::lxc_unit_inside("/lxc.payload.web/system.slice/nginx.service", "nginx.service")]
    #[case::nspawn("/machine.slice/systemd-nspawn@x.service/payload", "systemd-nspawn@x.service")]
    #[case::nspawn_unit_inside(
        "/machine.slice/systemd-nspawn@x.service/payload/system.slice/nginx.service",
        "nginx.service"
    )]
    #[case::machine(
        r"/machine.slice/machine-qemu\x2d1\x2dvm.scope/libvirt/emulator",
        "machine-qemu-1-vm.scope"
    )]
    #[case::nomad(
        "/nomad.slice/share.slice/6f265890-5165-7fab-6b52-18d112345678.web.scope",
        "6f265890-5165-7fab-6b52-18d112345678.web.scope"
    )]
    #[case::nomad_cores(
        "/nomad.slice/reserve.slice/6f265890-5165-7fab-6b52-18d112345678.web.scope",
        "6f265890-5165-7fab-6b52-18d112345678.web.scope"
    )]
    #[case::root("/", "")]
    fn a_host_process_is_known_by_its_unit(#[case] path: &str, #[case] unit: &str) {
        let names = CgroupNames::of(path);
        assert_eq!((names.unit.as_str(), names.container_id.as_str()), (unit, ""));
    }

    #[rstest]
    #[case::buildkit("/docker/buildkit/xmnsy62tgqiaaq6gdkbcurhl9", "xmnsy62tgqiaaq6gdkbcurhl9")]
    #[case::buildkit_below_systemd(
        "/system.slice/docker.service/buildkit/xmnsy62tgqiaaq6gdkbcurhl9/init",
        "xmnsy62tgqiaaq6gdkbcurhl9"
    )]
    #[case::fargate("/ecs/H/H-123", "0123456789abcdef0123456789abcdef-123")]
    #[case::fargate_with_cluster("/ecs/shop/H/H-4294967295", "0123456789abcdef0123456789abcdef-4294967295")]
    #[case::garden(
        "/system.slice/garden.service/garden/6f265890-5165-7fab-6b52-18d1",
        "6f265890-5165-7fab-6b52-18d1"
    )]
    #[case::garden_with_classes(
        "/garden/good/6f265890-5165-7fab-6b52-18d112345678",
        "6f265890-5165-7fab-6b52-18d112345678"
    )]
    #[case::mesos("/mesos/6f265890-5165-7fab-6b52-18d112345678", "6f265890-5165-7fab-6b52-18d112345678")]
    fn runtimes_with_other_ids_are_known(#[case] form: &str, #[case] id: &str) {
        let path = written_out(form);
        let names = CgroupNames::of(&path);
        assert_eq!((names.container_id.as_str(), names.unit.as_str(), names.pod_uid.as_str()), (id, "", ""));
        assert!(container_part(&path).ends_with(id));
    }

    #[test]
    fn enclosing_containers_are_kept_outermost_first() {
        let (j, other) = ("f".repeat(64), format!("{}0", &UID[..35]));
        let outer = |form: &str| {
            CgroupNames::of(&written_out(form))
                .outer
                .into_iter()
                .map(|container| (container.id, container.pod_uid))
                .collect::<Vec<_>>()
        };
        assert_eq!(outer("/kubepods/podU/J/docker/I"), [(j.clone(), UID.to_owned())]);
        assert_eq!(
            outer("/system.slice/docker-J.scope/kubelet/kubepods/burstable/podU/I"),
            [(j.clone(), String::new())]
        );
        assert_eq!(outer(&format!("/kubepods/podU/J/kubepods/pod{other}/I")), [(j, UID.to_owned())]);
        assert!(outer("/kubepods/podU/I/init.scope").is_empty());
        assert_eq!(outer(&"/I".repeat(1000)).len(), MAX_OUTER);
    }

    fn written_out(form: &str) -> String {
        form.replace("podU_", &format!("pod{}", UID.replace('-', "_")))
            .replace("podU", &format!("pod{UID}"))
            .replace("podH", &format!("pod{HASH}"))
            .replace("ecstasks-H", &format!("ecstasks-{HASH}"))
            .replace("/H", &format!("/{HASH}"))
            .replace('J', &"f".repeat(64))
            .replace('I', I)
    }

    #[test]
    fn the_part_of_a_container_and_of_its_pod() {
        let id = "0123456789abcdef".repeat(4);
        let pod = "/kubepods.slice/kubepods-pod12345678_9abc_def0_1234_56789abcdef0.slice";
        let container = format!("{pod}/cri-containerd-{id}.scope");
        let inside = format!("{container}/system.slice/x.service");
        for path in [&container, &inside] {
            assert_eq!(container_part(path), container);
            assert_eq!(pod_part(path), pod);
        }
        assert_eq!(container_part("/system.slice/x.service"), "/system.slice/x.service");
        assert_eq!(pod_part("/a/b"), "/a/b");
        assert_eq!(container_part("/"), "/");
    }
}
