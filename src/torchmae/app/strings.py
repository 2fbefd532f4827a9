"""The texts of the page in English and Chinese."""

from __future__ import annotations

from contextlib import suppress

from torchmae.words import in_words

LANGUAGES = {"en": "English", "zh": "中文"}

_TEXTS = {  # English, Chinese
    "about": (
        "{size} pixels, {channels} channels, patches of {patch}",
        "{size} 像素，{channels} 通道，图像块大小 {patch}",
    ),
    "upload": ("Your own image", "上传图像"),
    "examples": ("Held-out images of the run", "训练时留出的图像"),
    "tab_fill": ("Fill in", "补全"),
    "tab_see": ("What it sees", "特征"),
    "tab_near": ("Neighbours", "近邻"),
    "strategy": ("Mask patches", "掩码方式"),
    "random": ("at random", "随机"),
    "block": ("as a block", "整块"),
    "grid": ("in a grid", "网格"),
    "cells2": ("in cells of 2", "2 格一组"),
    "cells4": ("in cells of 4", "4 格一组"),
    "ratio": ("Masked, %", "掩码率（%）"),
    "seed": ("Seed", "随机种子"),
    "clear": ("Show all", "清除掩码"),
    "paint": ("Masked", "遮挡后"),
    "paint_help": (
        "Paint to mask patches; start on a masked patch to show it again. Keys: arrows and space.",
        "在图上涂抹即可遮挡图像块；从已遮挡处开始涂抹，则恢复显示。也可用方向键移动、空格键切换。",
    ),
    "reconstructed": ("Reconstructed", "重建"),
    "original": ("Original", "原图"),
    "error": ("Error (brightest: {peak})", "误差（最亮处为 {peak}）"),
    "errors": ("Errors of the masked pixels", "被遮挡像素的误差"),
    "masked": ("masked", "掩码率"),
    "interpolation": ("interpolation, no learning", "插值（无需学习）"),
    "note_pixels": ("Masked patches are shown as predicted.", "被遮挡的图像块按模型的预测显示。"),
    "note_normalised": (
        "This model predicts patches without their mean and contrast. Both are put back from the original image, "
        "so these pictures and figures are better than the visible patches alone allow.",
        "此模型预测的图像块不含均值和对比度，二者取自原图；因此图像和指标都优于只凭可见图像块所能达到的结果。",
    ),
    "units": (
        "MSE and PSNR are computed over the masked pixels, with values from 0 to 1.",
        "MSE 与 PSNR 只计算被遮挡的像素，像素值范围为 0 到 1。",
    ),
    "colours": ("Features as colours", "特征着色"),
    "mean_head": ("Attention, mean", "注意力（平均）"),
    "head": ("Head {number}", "第 {number} 头"),
    "see_help": (
        "Nothing is masked here. Patches of similar colour have similar features: the colours are the first three "
        "principal components of the features, without the part that depends on position only. The attention maps "
        "are those of the class token in the last block, each from 0 (dark) to its own largest value (bright).",
        "这里不遮挡任何图像块。颜色相近表示特征相近：颜色取特征的前三个主成分，已去除只与位置有关的部分。"
        "注意力图来自最后一层的类别标记（class token），每幅图的亮度从 0（暗）到自身的最大值（亮）。",
    ),
    "no_class_token": (
        "{name} has no class token, so it has no attention map.",
        "{name} 没有类别标记（class token），因此没有注意力图。",
    ),
    "near_help": (
        "The images of the embedded data set with the nearest features, and the cosine similarity of their "
        "features, centred on the mean of the data set.",
        "数据集中特征最接近的图像，以及特征的余弦相似度（已减去数据集的均值）。",
    ),
    "near_none": (
        "This page has no embedded data set. Write features to a file, then start the page with that file:",
        "此页面没有可供检索的特征。请先把数据集的特征写入文件，再用该文件启动页面：",
    ),
    "not_shown": ("image not found", "找不到图像"),
    "start": ("Choose an image to begin.", "请先选择一幅图像。"),
    "none_masked": ("No patch is masked. Paint on the image to mask patches.", "没有遮挡任何图像块，请在图上涂抹。"),
    "all_masked": (
        "All patches are masked. Leave at least one visible to the model.",
        "所有图像块都被遮挡了，请至少保留一块。",
    ),
    "cannot_read": ("This file cannot be used: {reason}", "无法使用此文件：{reason}"),
    "failed": ("That did not work: {reason}", "操作失败：{reason}"),
}

_CHINESE = {"signal": ("信号", "采样点"), "volume": ("体数据", "体素"), "clip": ("视频", "像素")}

TEXT = {language: {key: pair[i] for key, pair in _TEXTS.items()} for i, language in enumerate(LANGUAGES)}
"""Texts by language and key; both languages of a text have the same {places}."""


def text_for(language: str, kind: str) -> dict[str, str]:
    """The texts of a page about samples of a kind (`words.kind_of`)."""
    if language == "zh":
        sample, point = _CHINESE.get(kind, ("图像", "像素"))
        return {key: text.replace("图像", sample).replace("像素", point) for key, text in TEXT["zh"].items()}
    return {key: in_words(text, kind) for key, text in TEXT[language].items()}


def preferred(header: str) -> str:
    """The language of `LANGUAGES` with the highest weight in an Accept-Language header; English if it has neither."""
    weights: dict[str, float] = {}
    for part in header.split(","):
        tag, _, weight = part.strip().partition(";q=")
        with suppress(ValueError):
            weights.setdefault(tag.partition("-")[0].lower(), float(weight or 1))
    return max((language for language in weights if language in LANGUAGES), key=weights.__getitem__, default="en")
