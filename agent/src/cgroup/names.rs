//! The names in the path of a control group: container, pod, systemd unit.

/// The names in the path of a control group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CgroupNames {
    /// 64 hex digits; empty for a process outside of containers.
    pub container_id: String,
    /// With dashes, or the 32 hex digits of a static pod; empty if the path names no pod.
    pub pod_uid: String,
    /// The starter of a process outside of containers: its systemd unit (`ssh.service`), an LXC container
    /// (`lxc.payload.web`), a service of Talos (`podruntime/kubelet`).
    pub unit: String,
}

impl CgroupNames {
    /// Parses a path below the hierarchy's root. Of nested containers the innermost counts.
    pub fn of(path: &str) -> Self {
        let mut names = Self::default();
        for component in path.split('/') {
            if let Some(id) = container_id(component) {
                id.clone_into(&mut names.container_id);
            }
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
}

/// `…-ID.scope`, `…:ID`, `ID`; not CRI-O's monitor of a container.
fn container_id(component: &str) -> Option<&str> {
    let stem = component.strip_suffix(".scope").unwrap_or(component);
    let (prefix, id) = stem.split_at_checked(stem.len().checked_sub(64)?)?;
    let is_id = id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let stands_alone = prefix.is_empty() || prefix.ends_with(['-', ':']);
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
    #[case::root("/", "")]
    fn a_host_process_is_known_by_its_unit(#[case] path: &str, #[case] unit: &str) {
        let names = CgroupNames::of(path);
        assert_eq!((names.unit.as_str(), names.container_id.as_str()), (unit, ""));
    }

    fn written_out(form: &str) -> String {
        form.replace("podU_", &format!("pod{}", UID.replace('-', "_")))
            .replace("podU", &format!("pod{UID}"))
            .replace("podH", &format!("pod{HASH}"))
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
