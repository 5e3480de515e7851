//! What a control group's path tells: container, pod, systemd unit.

/// What a control group's path tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CgroupNames {
    /// 64 hex digits; empty where the process is in no container.
    pub container_id: String,
    /// With dashes, or the 32 hex digits of a static pod; empty where there is none.
    pub pod_uid: String,
    /// The systemd unit of a process outside of containers: `ssh.service`.
    pub unit: String,
}

impl CgroupNames {
    /// Reads a path below the hierarchy's root. Of nested containers the innermost counts.
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

/// The path in one hierarchy, from the text of `/proc/PID/cgroup`: of the controller `controller`, or of cgroup2 for an
/// empty name.
pub(super) fn path_in(text: &str, controller: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let here = if controller.is_empty() {
            number == "0" && controllers.is_empty()
        } else {
            controllers.split(',').any(|name| name == controller)
        };
        here.then(|| path.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_container_path() {
        let i = "0123456789abcdef".repeat(4);
        let j = "f".repeat(64);
        let u = "12345678-9abc-def0-1234-56789abcdef0";
        let u_ = u.replace('-', "_");
        let h = "0123456789abcdef0123456789abcdef";
        let pod = format!("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{u_}.slice");
        let cases = [
            ("1 containerd, systemd", format!("{pod}/cri-containerd-{i}.scope"), true, u),
            (
                "2 Guaranteed",
                format!("/kubepods.slice/kubepods-pod{u_}.slice/cri-containerd-{i}.scope"),
                true,
                u,
            ),
            ("3 cgroupfs", format!("/kubepods/besteffort/pod{u}/{i}"), true, u),
            ("4 cgroupfs, Guaranteed", format!("/kubepods/pod{u}/{i}"), true, u),
            ("5 static pod", format!("/kubepods/burstable/pod{h}/{i}"), true, h),
            (
                "6 mixed drivers",
                format!(
                    "/system.slice/containerd.service/kubepods-burstable-pod{u_}.slice:cri-containerd:{i}"
                ),
                true,
                u,
            ),
            ("7 CRI-O", format!("{pod}/crio-{i}.scope"), true, u),
            ("8 CRI-O, crun", format!("{pod}/crio-{i}.scope/container"), true, u),
            ("9 CRI-O, cgroupfs", format!("/kubepods/besteffort/pod{u}/crio-{i}"), true, u),
            ("10 conmon", format!("{pod}/crio-conmon-{i}.scope"), false, u),
            ("11 docker, systemd", format!("{pod}/docker-{i}.scope"), true, u),
            ("12 docker, cgroupfs", format!("/kubepods/besteffort/pod{u}/{i}"), true, u),
            ("13 made inside", format!("/kubepods/besteffort/pod{u}/{i}/kube-proxy"), true, u),
            ("14 systemd inside", format!("{pod}/cri-containerd-{i}.scope/system.slice/x.service"), true, u),
            (
                "15 private namespace",
                format!("/../../kubepods-besteffort-pod{u_}.slice/cri-containerd-{i}.scope"),
                true,
                u,
            ),
            (
                "16 nested",
                format!("/system.slice/docker-{j}.scope/kubelet/kubepods/burstable/pod{u}/{i}"),
                true,
                u,
            ),
            (
                "17 kind",
                format!(
                    "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{u_}.slice/cri-containerd-{i}.scope"
                ),
                true,
                u,
            ),
            ("18 docker", format!("/system.slice/docker-{i}.scope"), true, ""),
            ("19 docker, cgroupfs", format!("/docker/{i}"), true, ""),
            ("20 podman", format!("/machine.slice/libpod-{i}.scope/container"), true, ""),
        ];
        for (name, path, contained, uid) in cases {
            let names = CgroupNames::of(&path);
            assert_eq!(names.container_id, if contained { i.as_str() } else { "" }, "{name}");
            assert_eq!(names.pod_uid, uid, "{name}");
            assert!(!contained || names.unit.is_empty(), "{name}");
        }
    }

    #[test]
    fn the_unit_of_a_host_process() {
        for (path, unit) in [
            ("/system.slice/ssh.service", "ssh.service"),
            ("/user.slice/user-0.slice/session-1.scope", "session-1.scope"),
            (r"/system.slice/system-getty.slice/getty\x2dtty1.service", "getty-tty1.service"),
            (r"/x\xzz.service", r"x\xzz.service"),
            ("/", ""),
        ] {
            assert_eq!(CgroupNames::of(path).unit, unit, "{path}");
        }
    }

    #[test]
    fn the_line_of_the_hierarchy_is_found() {
        let text = "5:cpu,cpuacct:/a\n1:name=systemd:/b\n0::/c:d\n";
        assert_eq!(path_in(text, "").as_deref(), Some("/c:d"));
        assert_eq!(path_in(text, "cpuacct").as_deref(), Some("/a"));
        assert_eq!(path_in(text, "memory"), None);
    }
}
