//! The `prompt-service` program. See [`prompt_service::program`].

use std::process::ExitCode;

fn main() -> ExitCode {
    prompt_service::program::main()
}
