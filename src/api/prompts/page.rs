//! One page of a list, bounded in bytes as well as in rows.

use crate::domain::{Prompt, PromptId, UserId};
use crate::error::Error;
use crate::services::prompts::Prompts;

/// The texts of a page, in bytes, beyond which it ends early. A hundred prompts of the greatest length with their answers would be 25 MB, for
/// each of any number of requests at once.
const PAGE_BYTES: usize = 1 << 20;
/// Prompts read from the store at once, so that no more than these lie in memory beside the page. A page of the default 20 is one read.
const READ: usize = 25;

/// Up to `limit` of the user's prompts older than `before`, newest first, and where the next page starts, if there is one. The page
/// ends before its texts are more than [`PAGE_BYTES`], but holds one prompt at least.
///
/// # Errors
/// Those of the store.
pub async fn read_page(
    prompts: &Prompts,
    user_id: UserId,
    mut before: Option<PromptId>,
    limit: usize,
) -> Result<(Vec<Prompt>, Option<PromptId>), Error> {
    let mut page = Page::default();
    loop {
        let wanted = READ.min(limit - page.prompts.len());
        let (read, next) = prompts.list(user_id, before, wanted).await?;
        for prompt in read {
            if let Err(last) = page.push(prompt) {
                return Ok((page.prompts, Some(last)));
            }
        }
        if next.is_none() || page.prompts.len() >= limit {
            return Ok((page.prompts, next));
        }
        before = next;
    }
}

#[derive(Default)]
struct Page {
    prompts: Vec<Prompt>,
    bytes: usize,
}

impl Page {
    /// Takes one more; if it is too much, answers the last one taken.
    fn push(&mut self, prompt: Prompt) -> Result<(), PromptId> {
        self.bytes += prompt.prompt.len() + prompt.response.as_ref().map_or(0, String::len);
        match self.prompts.last() {
            Some(last) if self.bytes > PAGE_BYTES => Err(last.id),
            _ => {
                self.prompts.push(prompt);
                Ok(())
            }
        }
    }
}
