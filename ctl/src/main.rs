//! The program `gannetctl`. The library holds everything but the process: arguments, output streams, exit code.

use std::{
    io::{self, IsTerminal as _},
    process::ExitCode,
};

use gannetctl::{Console, parse, run};

fn main() -> ExitCode {
    let cli = match parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) => {
            // Prints help to standard output and errors to standard error.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ =
                io::Write::write_fmt(&mut io::stderr(), format_args!("gannetctl: cannot start: {error}\n"));
            return ExitCode::FAILURE;
        }
    };
    let (mut out, mut err) = (io::stdout(), io::stderr());
    let terminal = out.is_terminal();
    let mut console = Console { out: &mut out, err: &mut err, terminal };
    ExitCode::from(runtime.block_on(run(cli, &mut console)))
}
