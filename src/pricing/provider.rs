//! Whose prices are in force at an address.

/// Addresses that belong to one provider for certain, and the word that LiteLLM's list has for it.
/// A name that begins with a dot stands for all hosts that end in it.
const HOSTS: [(&str, &str); 30] = [
    ("ai-gateway.vercel.sh", "vercel_ai_gateway"),
    ("api.anthropic.com", "anthropic"),
    ("api.cerebras.ai", "cerebras"),
    ("api.deepinfra.com", "deepinfra"),
    ("api.deepseek.com", "deepseek"),
    ("api.fireworks.ai", "fireworks_ai"),
    ("api.groq.com", "groq"),
    ("api.hyperbolic.xyz", "hyperbolic"),
    ("api.minimax.io", "minimax"),
    ("api.mistral.ai", "mistral"),
    ("api.moonshot.ai", "moonshot"),
    ("api.novita.ai", "novita"),
    ("api.openai.com", "openai"),
    ("api.perplexity.ai", "perplexity"),
    ("api.sambanova.ai", "sambanova"),
    ("api.scaleway.ai", "scaleway"),
    ("api.studio.nebius.com", "nebius"),
    ("api.tokenfactory.nebius.com", "nebius"),
    ("api.together.ai", "together_ai"),
    ("api.together.xyz", "together_ai"),
    ("api.voyageai.com", "voyage"),
    ("api.x.ai", "xai"),
    ("api.z.ai", "zai"),
    ("codestral.mistral.ai", "codestral"),
    ("dashscope-intl.aliyuncs.com", "dashscope"),
    ("dashscope.aliyuncs.com", "dashscope"),
    ("generativelanguage.googleapis.com", "gemini"),
    // No row has this word: this provider's prices are not in the list, and those of others are
    // not its own.
    ("openrouter.ai", "openrouter"),
    (".openai.azure.com", "azure"),
    (".services.ai.azure.com", "azure_ai"),
];

/// The provider at this host, in the word of [`ModelPrices::provider`](super::ModelPrices). `None`
/// for hosts that the program does not know, such as a proxy's: there any row may be meant.
pub fn provider_of_host(host: &str) -> Option<&'static str> {
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    let is_meant = |name: &str| host == name || (name.starts_with('.') && host.ends_with(name));
    HOSTS
        .iter()
        .find(|(name, _)| is_meant(name))
        .map(|(_, provider)| *provider)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_host_has_its_provider_and_no_other_has_one() {
        assert_eq!(provider_of_host("api.openai.com"), Some("openai"));
        assert_eq!(provider_of_host("API.Groq.com."), Some("groq"));
        assert_eq!(provider_of_host("mine.openai.azure.com"), Some("azure"));
        for host in [
            "localhost",
            "api.openai.com.example",
            "openai.azure.com",
            "",
        ] {
            assert_eq!(provider_of_host(host), None, "{host}");
        }
    }
}
