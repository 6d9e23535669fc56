"""The families of the table, and why some of them differ from what their config says."""

from __future__ import annotations


def _words(text: str) -> list[str]:
    return text.split()


TRANSFORMERS = _words("""
albert bert big_bird bros camembert canine convbert data2vec-text deberta deberta-v2 distilbert
electra ernie eurobert flaubert fnet funnel ibert layoutlm layoutlmv3 longformer luke
markuplm megatron-bert mobilebert modernbert mpnet mra nomic_bert nystromformer perceiver reformer
rembert roberta roformer splinter squeezebert tapas visual_bert xlm xlm-roberta xlnet yoso

bamba biogpt bloom codegen cohere cohere2 ctrl deepseek_v3 falcon falcon_mamba gemma gemma2
gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite granitemoe
helium jamba lfm2 llama mamba mamba2 minimax mistral mixtral mpt nemotron_h olmo olmo2 olmoe opt
persimmon phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next recurrent_gemma rwkv smollm3 stablelm
starcoder2 trocr xglm zamba zamba2

bart bigbird_pegasus blenderbot encoder-decoder fsmt led longt5 m2m_100 marian mbart mt5 mvp
nllb-moe pegasus plbart prophetnet switch_transformers t5 t5gemma udop umt5

beit bit convnext convnextv2 cvt data2vec-vision deit depth_anything detr dinov2 dinov3_convnext
dinov3_vit dpt efficientnet focalnet glpn hiera ijepa levit mobilenet_v1 mobilenet_v2 mobilevit
poolformer pvt regnet resnet rt_detr sam segformer swiftformer swin swinv2 timesformer
table-transformer timm_wrapper upernet videomae vit vit_mae vit_msn vivit yolos

audio-spectrogram-transformer data2vec-audio hubert moonshine seamless_m4t sew speech_to_text
speecht5 unispeech wav2vec2 wav2vec2-bert wav2vec2-conformer wavlm whisper
patchtst timesfm

align altclip aria blip blip-2 bridgetower chinese_clip clap clip clipseg florence2 gemma3 git
got_ocr2 grounding-dino groupvit idefics idefics2 idefics3 instructblip internvl kosmos-2 llama4
llava llava_next lxmert mllama owlvit paligemma phi4_multimodal qwen2_5_vl qwen2_audio qwen2_vl
qwen3_vl siglip smolvlm vilt vision-encoder-decoder vision-text-dual-encoder voxtral xclip
""")

TIMM = _words("""
beit_base_patch16_224 cait_xxs24_224 coat_tiny convmixer_768_32 convnext_atto convnextv2_atto
crossvit_9_240 cspresnet50 deit_tiny_distilled_patch16_224 densenet121 dla34 edgenext_small
efficientnet_b0 efficientformer_l1 eva02_tiny_patch14_224 fastvit_t8 focalnet_tiny_srf ghostnet_100
hrnet_w18_small inception_v4 levit_128s maxvit_tiny_tf_224 mixer_b16_224 mobilenetv3_large_100
mobilevit_s mvitv2_tiny nfnet_f0 pit_ti_224 poolformer_s12 pvt_v2_b0 regnety_002 repvgg_a0
res2net50_14w_8s resnet18 resnetv2_50 rexnet_100 swin_tiny_patch4_window7_224
swinv2_tiny_window8_256 tf_efficientnetv2_s tnt_s_patch16_224 tresnet_m twins_svt_small vgg11
visformer_small vit_tiny_patch16_224 volo_d1_224 xception41 xcit_nano_12_p8_224
""")

TORCHVISION = _words("""
alexnet convnext_tiny deeplabv3_mobilenet_v3_large deeplabv3_resnet50 densenet121 efficientnet_b0
efficientnet_v2_s fasterrcnn_mobilenet_v3_large_fpn fasterrcnn_resnet50_fpn fcn_resnet50
fcos_resnet50_fpn googlenet inception_v3 keypointrcnn_resnet50_fpn lraspp_mobilenet_v3_large
maskrcnn_resnet50_fpn maxvit_t mc3_18 mnasnet0_5 mobilenet_v2 mobilenet_v3_small mvit_v1_b
r2plus1d_18 resnet18 resnext50_32x4d retinanet_resnet50_fpn s3d shufflenet_v2_x1_0 squeezenet1_0
ssd300_vgg16 ssdlite320_mobilenet_v3_large swin3d_t swin_t vgg16_bn vit_b_16 wide_resnet50_2
""")

# family -> why its numbers of blocks aren't those that the config names
DIFFERS: dict[str, str] = {
    "albert": "all its layers share the weights of one, which is one block.",
    "canine": "one layer of characters below and one above the layers that the config counts.",
    "funnel": "the config gives the sizes of its three blocks of layers, which are blocks here.",
    "perceiver": "`num_self_attends_per_block`, 26.",
    "nemotron_h": "the config lists the kind of each layer (`layers_block_type`), 52 of them.",
    "zamba": "the config lists the kind of each layer, 76 of them, two of which share weights.",
    "zamba2": "the config lists the kind of each layer, 54 of them.",
    "cvt": "`depth` is a list; its three stages are blocks.",
    "efficientnet": "counted by `num_block_repeats` and `depth_coefficient`.",
    "mobilenet_v1": "the class has its 26 convolutions in its code.",
    "mobilenet_v2": "the class has its 16 blocks in its code.",
    "mobilevit": "the class has its five stages in its code.",
    "segformer": "`depths` counts the blocks of each stage: 2 + 2 + 2 + 2.",
    "timm_wrapper": "the config names a model of timm, a ResNet of four stages.",
    "seamless_m4t": "`speech_encoder_layers`, 24.",
    "align": "`num_block_repeats` of its EfficientNet.",
    "groupvit": "`depths` counts the layers of each stage: 6 + 3 + 3.",
    "kosmos-2": "`layers` of its text model, 24.",
    "lxmert": "`l_layers`, `r_layers` and `x_layers`: 9, 5 and 5.",
    "mllama": "eight global layers (`num_global_layers`) stand on those of the vision tower.",
    "phi4_multimodal": "`num_blocks` of its audio tower, 24.",
    "xclip": "one layer across frames (`mit_num_hidden_layers`), two of the prompt generator.",
}

# what is wrong, or refused
LIMITS: dict[str, str] = {
    "canine": "the top block, `final_char_encoder`, gets no gradient where the head reads the "
    "pooled output of the layers below it, as in classification. Name the blocks with `trainable`.",
    "perceiver": "its classification head is inside of `perceiver.decoder`, which counts as "
    'backbone: write `FreezeBackbone(trainable="perceiver.decoder")`.',
    "rt_detr, rt_detr_v2": "its class and box heads are inside of `model.decoder`, so that "
    "`FreezeBackbone()` leaves nothing to train, and says so: write "
    '`FreezeBackbone("model.backbone")`, or `trainable=["**.class_embed", "**.bbox_embed"]`.',
    "llava and its kin": "they read the vision tower's last layer but one "
    "(`vision_feature_layer=-2`): the top one gets no gradient, with or without these callbacks. "
    "To train the one that is read, name it with `trainable`.",
    "idefics": "its cross-attention layers are a stack above the language model's layers; they "
    "stand between those.",
    "CLIP and other pairs of encoders": "the text stack is listed before the vision stack, and "
    "`GradualUnfreeze` unfreezes one after the other; `trainable_layers` counts in both.",
    "models of audio and speech made by diffusion, codecs and vocoders (bark, clvp, csm, dac, "
    "encodec, univnet, vits, xcodec and others)": "parts that play no role in fine-tuning a "
    "classifier are sorted by structure alone. Give `groups`, or name the backbone.",
    "timm's coat, hrnet": "branches of several resolutions are found one after the other.",
    "families that need a library which isn't installed (layoutlmv2, dinat, mask2former, "
    "oneformer and others)": "not looked at.",
}
