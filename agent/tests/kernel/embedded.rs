//! Python within another program. Needs the shared library of the system's Python, `libpython3-dev` of Debian.

use std::{fs, process::Command};

use crate::{
    common::program,
    languages::{SYSTEM_PYTHON, check_python},
};

/// Loads the library in its first argument, removes its file, and runs the program in the second one.
const HOST: &str = r#"
#include <dlfcn.h>
#include <stdio.h>
#include <unistd.h>
int main(int argc, char **argv) {
	void *library = dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL);
	if (!library || unlink(argv[1])) {
		puts(dlerror());
		return 1;
	}
	void (*start)(int) = dlsym(library, "Py_InitializeEx");
	int (*run)(FILE *, const char *, int, void *) = dlsym(library, "PyRun_SimpleFileExFlags");
	start(0);
	return run(fopen(argv[2], "r"), argv[2], 1, NULL) + 1;
}"#;

/// Returns the path of the shared library of the system's Python.
#[track_caller]
fn library() -> String {
    let script =
        "import sysconfig as of; print(of.get_config_var('LIBDIR') + '/' + of.get_config_var('INSTSONAME'))";
    let output = Command::new(SYSTEM_PYTHON).args(["-c", script]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Checks a program that loads Python while it runs and removes the library from the disk, as programs of one file do that unpack
/// themselves.
#[test]
fn embedded_python_of_a_deleted_library_has_its_names() {
    let host = program("embeds-python", HOST, &["-ldl"]);
    let library = library();
    let directory = tempfile::tempdir().unwrap();
    let copy = directory.path().join("libpython.so");
    fs::copy(&library, &copy).unwrap_or_else(|error| panic!("{library}: {error}; install libpython3-dev"));
    check_python(host.to_str().unwrap(), &[copy.to_str().unwrap()]);
}
