"""Names in files and the names they stand for. Data only, so that every framework and format shares them."""

# Projections of the VAE's attention in folders that were written before 2023.
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# What PyTorch keeps in lists: `down_blocks.0` there is `down_blocks_0` in Flax.
LISTS = (
    "down_blocks", "up_blocks", "resnets", "attentions", "transformer_blocks", "downsamplers", "upsamplers", "net",
    "to_out",
)  # fmt: skip

# --- Single files, in the layout of the latent diffusion code (ldm). Our names on the left. ---

# Where each network's names begin; the first is the one that is written.
UNET_PREFIXES = ("model.diffusion_model.",)
VAE_PREFIXES = ("first_stage_model.", "vae.")
CLIP_PREFIXES = ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.")
OPEN_CLIP_PREFIXES = ("cond_stage_model.model.",)
# The average of the UNet's weights over its training: here the rest of the name has no dots.
EMA_PREFIX = "model_ema.diffusion_model"

# Parameters that such files hold besides, and that the networks do without.
LEFT_OUT = r"""
    model_ema\. .* | .* position_ids | .* attn_mask | .* logit_scale | .* text_projection (\.weight)? | .* \.loss\. .*
    | loss\. .* | betas | (sqrt_|log_)? (recip(m1)?_|one_minus_)? alphas_cumprod (_prev)? | posterior_ .* | logvar
    | lvlb_weights | scale_factor | denoiser\. .* | v_pred | ztsnr | embedding_manager\. .*
"""

UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}

VAE_ENDS = {
    "conv_in": "conv_in",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.1": "mid.block_2",
    "conv_norm_out": "norm_out",
    "conv_out": "conv_out",
}
VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}

# CLIP's text encoder has our names in a single file; OpenCLIP's has others.
OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
# These lie one under the other in `attn.in_proj_weight` and `attn.in_proj_bias`.
OPEN_CLIP_THIRDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
