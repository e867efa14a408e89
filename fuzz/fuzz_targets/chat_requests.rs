#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| prompt_service::fuzzing::chat_requests(data));
