//! Tensor names: one spelling inside, several in files.
//!
//! Inside, names are those of the Hugging Face classes for Llama, Mistral and the Apriel-H1 hybrid:
//! `model.layers.{l}.self_attn.q_proj.weight`, `model.layers.{l}.mixer.in_proj.weight`, … Files of the `apriel2` format
//! say `model.decoder.blocks.{l}.mixer.…` for both kinds of mixer; those of M1 say `model.layers.{l}.mamba.…`.

/// The name inside for a name in a file.
pub(super) fn canonical(name: &str) -> String {
    if let Some((layer, rest)) = layer_of(name, "model.decoder.blocks.") {
        return match rest.strip_prefix("mixer.") {
            Some(attention) if is_attention(attention) => format!("model.layers.{layer}.self_attn.{attention}"),
            _ => format!("model.layers.{layer}.{rest}"),
        };
    }
    if let Some((layer, rest)) = layer_of(name, "model.layers.")
        && let Some(mixer) = rest.strip_prefix("mamba.")
    {
        return format!("model.layers.{layer}.mixer.{mixer}");
    }
    name.to_owned()
}

/// The name in a file of the `apriel2` format for a name inside.
pub(super) fn apriel2(name: &str) -> String {
    match layer_of(name, "model.layers.") {
        Some((layer, rest)) => {
            let rest = match rest.strip_prefix("self_attn.") {
                Some(attention) => format!("mixer.{attention}"),
                None => rest.to_owned(),
            };
            format!("model.decoder.blocks.{layer}.{rest}")
        }
        None => name.to_owned(),
    }
}

/// Tensors that older software stores beside the weights and that follow from the configuration.
pub(super) fn is_derived_buffer(name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq") || name.ends_with("rotary_emb.original_inv_freq")
}

fn layer_of<'a>(name: &'a str, prefix: &str) -> Option<(&'a str, &'a str)> {
    let (layer, rest) = name.strip_prefix(prefix)?.split_once('.')?;
    (!layer.is_empty() && layer.bytes().all(|byte| byte.is_ascii_digit())).then_some((layer, rest))
}

fn is_attention(rest: &str) -> bool {
    ["q_proj.", "k_proj.", "v_proj.", "o_proj."].iter().any(|projection| rest.starts_with(projection))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_has_one_name_inside() {
        for (file, inside) in [
            ("model.embed_tokens.weight", "model.embed_tokens.weight"),
            ("model.layers.3.self_attn.q_proj.weight", "model.layers.3.self_attn.q_proj.weight"),
            ("model.decoder.blocks.3.mixer.q_proj.bias", "model.layers.3.self_attn.q_proj.bias"),
            ("model.decoder.blocks.12.mixer.out_proj.weight", "model.layers.12.mixer.out_proj.weight"),
            ("model.decoder.blocks.12.mixer.A_log", "model.layers.12.mixer.A_log"),
            ("model.decoder.blocks.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
            ("model.layers.7.mamba.conv1d.bias", "model.layers.7.mixer.conv1d.bias"),
            ("model.decoder.blocks.x.mixer.A_log", "model.decoder.blocks.x.mixer.A_log"),
        ] {
            assert_eq!(canonical(file), inside);
        }
        for name in [
            "model.layers.3.self_attn.o_proj.weight",
            "model.layers.3.mixer.out_proj.weight",
            "model.layers.3.input_layernorm.weight",
            "model.norm.weight",
        ] {
            assert_eq!(canonical(&apriel2(name)), name);
        }
    }
}
