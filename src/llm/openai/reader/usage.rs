//! Usage, as servers write it.

use super::json::JsonValue;
use crate::llm::TokenUsage;

/// The last readable figure of each kind.
#[derive(Clone, Copy, Debug, Default)]
pub struct UsageCounts {
    prompt: Option<u64>,
    completion: Option<u64>,
    /// As Anthropic and OpenAI's newer protocol name them.
    input: Option<u64>,
    output: Option<u64>,
    total: Option<u64>,
    /// Read from a cache, counted in the prompt too.
    cached: Option<u64>,
    /// Written into a cache, counted in the prompt too.
    cached_new: Option<u64>,
    /// Anthropic's names: not counted in the input.
    cache_read: Option<u64>,
    cache_creation: Option<u64>,
    reasoning: Option<u64>,
}

impl UsageCounts {
    /// Takes a usage object. Returns whether it has tokens of the request or of the answer.
    pub fn take(&mut self, usage: JsonValue<'_>) -> bool {
        let names = [
            "prompt_tokens",
            "completion_tokens",
            "input_tokens",
            "output_tokens",
            "total_tokens",
            "prompt_tokens_details",
            "input_tokens_details",
            "completion_tokens_details",
            "output_tokens_details",
            "prompt_cache_hit_tokens",
            "cache_read_input_tokens",
            "cache_creation_input_tokens",
        ];
        let [
            prompt,
            completion,
            input,
            output,
            total,
            of_prompt,
            of_input,
            of_completion,
            of_output,
            cache_hit,
            cache_read,
            cache_creation,
        ] = usage.object(names).members;
        let [prompt, completion] = [prompt, completion].map(count);
        let [input, output] = [input, output].map(count);
        let detail = |of: [Option<JsonValue<'_>>; 2], name: &str| {
            let mut details = of.into_iter().flatten();
            details.find_map(|details| {
                let [value] = details.object([name]).members;
                count(value)
            })
        };
        let of_request = [of_prompt, of_input];
        let cached = detail(of_request, "cached_tokens").or_else(|| count(cache_hit));
        let cached_new = detail(of_request, "cache_write_tokens")
            .or_else(|| detail(of_request, "cache_creation_tokens"));
        let reasoning = detail([of_completion, of_output], "reasoning_tokens");
        let keep = |place: &mut Option<u64>, new: Option<u64>| *place = new.or(*place);
        keep(&mut self.prompt, prompt);
        keep(&mut self.completion, completion);
        keep(&mut self.input, input);
        keep(&mut self.output, output);
        keep(&mut self.total, count(total));
        keep(&mut self.cached, cached);
        keep(&mut self.cached_new, cached_new);
        keep(&mut self.cache_read, count(cache_read));
        keep(&mut self.cache_creation, count(cache_creation));
        keep(&mut self.reasoning, reasoning);
        [prompt, completion, input, output]
            .iter()
            .any(Option::is_some)
    }

    /// Tokens of the request, as the server counts them.
    pub fn prompt_tokens(&self) -> Option<u32> {
        self.prompt.or(self.input).map(saturated)
    }

    /// Tokens of the answer, as the server counts them.
    pub fn completion_tokens(&self) -> Option<u32> {
        self.completion.or(self.output).map(saturated)
    }

    /// The tokens in kinds that do not overlap. `None` unless both those of the request and those
    /// of the answer are known.
    pub fn tokens(&self) -> Option<TokenUsage> {
        let (input, cache_read, cache_write) = self.request()?;
        let (output, reasoning) = self.answer()?;
        Some(TokenUsage {
            input,
            cache_read,
            cache_write,
            output,
            reasoning,
        })
    }

    /// Tokens of the request: at full price, read from a cache, written into one.
    fn request(&self) -> Option<(u64, u64, u64)> {
        let Some(prompt) = self.prompt else {
            // Anthropic counts cached tokens apart, OpenAI among the others.
            let input = self.input?;
            let read = self.cached.unwrap_or_default();
            let write = self.cached_new.unwrap_or_default();
            let apart = self.cache_read.unwrap_or_default();
            let apart_new = self.cache_creation.unwrap_or_default();
            let rest = without(without(input, read), write);
            // Gateways may say the same in both ways.
            return Some((rest, read.max(apart), write.max(apart_new)));
        };
        let read = self.cached.or(self.cache_read).unwrap_or_default();
        let write = self.cached_new.or(self.cache_creation).unwrap_or_default();
        Some((without(without(prompt, read), write), read, write))
    }

    /// Tokens of the answer: of its text, and of thoughts.
    fn answer(&self) -> Option<(u64, u64)> {
        let completion = self.completion.or(self.output)?;
        let reasoning = self.reasoning.unwrap_or_default();
        let prompt = self.prompt.or(self.input).unwrap_or_default();
        // Some servers (xAI, Gemini) count thoughts in the total alone.
        let known = prompt.saturating_add(completion);
        let apart = self.total.unwrap_or_default().saturating_sub(known);
        if self.prompt.is_some() && apart > 0 && apart >= reasoning {
            return Some((completion, apart));
        }
        Some((without(completion, reasoning), reasoning))
    }
}

/// The tokens without a part of them. If the part is larger, it was never among them.
fn without(tokens: u64, part: u64) -> u64 {
    tokens.checked_sub(part).unwrap_or(tokens)
}

fn saturated(tokens: u64) -> u32 {
    u32::try_from(tokens).unwrap_or(u32::MAX)
}

/// A number that can be one of tokens.
fn count(tokens: Option<JsonValue<'_>>) -> Option<u64> {
    let tokens = tokens?.number().filter(|tokens| *tokens >= 0.0)?;
    Some(tokens as u64).filter(|tokens| *tokens <= TokenUsage::MOST)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn tokens(usage: &Value) -> Option<[u64; 5]> {
        let mut counts = UsageCounts::default();
        counts.take(JsonValue::new(usage.to_string().as_bytes()));
        let tokens = counts.tokens()?;
        let TokenUsage {
            input,
            cache_read,
            cache_write,
            output,
            reasoning,
        } = tokens;
        Some([input, cache_read, cache_write, output, reasoning])
    }

    #[test]
    fn kinds_of_tokens_do_not_overlap_whatever_the_server_calls_them() {
        for (usage, expected) in [
            (
                json!({ "prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15 }),
                Some([10, 0, 0, 5, 0]),
            ),
            // OpenAI.
            (
                json!({ "prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150,
                    "prompt_tokens_details": { "cached_tokens": 64, "audio_tokens": 0 },
                    "completion_tokens_details": { "reasoning_tokens": 30 } }),
                Some([36, 64, 0, 20, 30]),
            ),
            // DeepSeek.
            (
                json!({ "prompt_tokens": 100, "completion_tokens": 5,
                    "prompt_cache_hit_tokens": 64, "prompt_cache_miss_tokens": 36 }),
                Some([36, 64, 0, 5, 0]),
            ),
            // OpenRouter and LiteLLM before Anthropic.
            (
                json!({ "prompt_tokens": 100, "completion_tokens": 5,
                    "prompt_tokens_details": { "cached_tokens": 20, "cache_write_tokens": 70 } }),
                Some([10, 20, 70, 5, 0]),
            ),
            (
                json!({ "prompt_tokens": 100, "completion_tokens": 5,
                    "cache_read_input_tokens": 20, "cache_creation_input_tokens": 70 }),
                Some([10, 20, 70, 5, 0]),
            ),
            // Anthropic: cached tokens stand beside the input.
            (
                json!({ "input_tokens": 10, "output_tokens": 5,
                    "cache_read_input_tokens": 20, "cache_creation_input_tokens": 70 }),
                Some([10, 20, 70, 5, 0]),
            ),
            // OpenAI's newer protocol.
            (
                json!({ "input_tokens": 100, "output_tokens": 50,
                    "input_tokens_details": { "cached_tokens": 64 },
                    "output_tokens_details": { "reasoning_tokens": 30 } }),
                Some([36, 64, 0, 20, 30]),
            ),
            // xAI counts thoughts beside the answer, Gemini in the total alone.
            (
                json!({ "prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 45,
                    "completion_tokens_details": { "reasoning_tokens": 30 } }),
                Some([10, 0, 0, 5, 30]),
            ),
            (
                json!({ "prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 45 }),
                Some([10, 0, 0, 5, 30]),
            ),
            // A part that is larger than the whole is no part of it.
            (
                json!({ "prompt_tokens": 10, "completion_tokens": 5,
                    "prompt_tokens_details": { "cached_tokens": 64 },
                    "completion_tokens_details": { "reasoning_tokens": 30 } }),
                Some([10, 64, 0, 5, 30]),
            ),
            (json!({ "prompt_tokens": 10 }), None),
            (json!({ "completion_tokens": 10 }), None),
            (json!({ "prompt_tokens": -1, "completion_tokens": 5 }), None),
            (json!({}), None),
        ] {
            assert_eq!(tokens(&usage), expected, "{usage}");
        }
    }

    proptest! {
        #[test]
        fn no_figures_overflow(figures in prop::collection::vec(any::<u64>(), 8)) {
            let usage = json!({ "prompt_tokens": figures[0], "completion_tokens": figures[1],
                "total_tokens": figures[2], "prompt_tokens_details": { "cached_tokens": figures[3],
                "cache_write_tokens": figures[4] }, "cache_read_input_tokens": figures[5],
                "cache_creation_input_tokens": figures[6],
                "completion_tokens_details": { "reasoning_tokens": figures[7] } });
            let are_tokens = figures[..2].iter().all(|figure| *figure <= TokenUsage::MOST);
            let read = tokens(&usage);
            prop_assert_eq!(read.is_some(), are_tokens);
            prop_assert!(read.into_iter().flatten().all(|figure| figure <= TokenUsage::MOST));
        }

        #[test]
        fn figures_that_can_be_tokens_are_read(figures in prop::collection::vec(0..=TokenUsage::MOST, 2)) {
            let usage = json!({ "prompt_tokens": figures[0], "completion_tokens": figures[1] });
            prop_assert_eq!(tokens(&usage), Some([figures[0], 0, 0, figures[1], 0]));
        }
    }
}
