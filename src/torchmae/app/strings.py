"""Every word of the page, in English and Chinese."""

from __future__ import annotations

LANGUAGES = {"en": "English", "zh": "中文"}

_ENGLISH = {
    "about": "{size} pixels, {channels} channels, patches of {patch}",
    "upload": "Your own image",
    "examples": "Held-out images of the run",
    "tab_fill": "Fill in",
    "tab_see": "What it sees",
    "tab_near": "Neighbours",
    "strategy": "Hide patches",
    "random": "at random",
    "block": "as a block",
    "grid": "in a grid",
    "cells2": "in cells of 2",
    "cells4": "in cells of 4",
    "ratio": "Hidden, %",
    "seed": "Seed",
    "clear": "Show all",
    "paint": "Masked",
    "paint_help": "Paint on it to hide patches; begin on a hidden one to show them. Keys: arrows and space.",
    "reconstructed": "Reconstructed",
    "original": "Original",
    "error": "Error (brightest: {peak})",
    "errors": "Errors of the hidden pixels",
    "hidden": "hidden",
    "interpolation": "interpolation, no learning",
    "note_pixels": "Hidden patches are shown as predicted.",
    "note_normalised": "This model predicts patches without their mean and contrast. Both are put back from the "
    "original image, so these pictures and figures look better than a guess from the visible patches alone would.",
    "units": "MSE and PSNR are of the hidden pixels, with values from 0 to 1.",
    "colours": "Features as colours",
    "mean_head": "Attention, mean",
    "head": "Head {number}",
    "see_help": "Nothing is hidden here. Patches of the same colour look alike to the model: colours are the first "
    "three principal components of their features, without what depends on a patch's place alone. Attention is that "
    "of the class token in the last block; each map goes from 0 (dark) to its own largest value (bright).",
    "no_class_token": "{name} has no class token, whose attention could be shown.",
    "near_help": "The images of the embedded data set whose features are nearest, with their cosine similarity, "
    "centred on the mean of the set.",
    "near_none": "No data set has been embedded for this page. Write features to a file, then start the page with it:",
    "not_shown": "image not found",
    "start": "Choose an image to begin.",
    "nothing_hidden": "Nothing is hidden. Paint on the image to hide patches.",
    "all_hidden": "All patches are hidden. Leave at least one for the model to see.",
    "cannot_read": "This file cannot be used: {reason}",
    "failed": "That did not work: {reason}",
}

_CHINESE = {
    "about": "{size} 像素，{channels} 通道，图块 {patch}",
    "upload": "上传自己的图像",
    "examples": "训练时留出的图像",
    "tab_fill": "补全",
    "tab_see": "模型看到什么",
    "tab_near": "近邻",
    "strategy": "遮盖方式",
    "random": "随机",
    "block": "整块",
    "grid": "网格",
    "cells2": "边长 2 的小块",
    "cells4": "边长 4 的小块",
    "ratio": "遮盖比例（%）",
    "seed": "随机种子",
    "clear": "全部显示",
    "paint": "遮盖后",
    "paint_help": "在图上涂抹即可遮盖图块；从已遮盖的图块开始涂，则重新显示。键盘：方向键与空格。",
    "reconstructed": "重建",
    "original": "原图",
    "error": "误差（最亮处：{peak}）",
    "errors": "被遮盖像素的误差",
    "hidden": "遮盖",
    "interpolation": "插值（无需学习）",
    "note_pixels": "被遮盖的图块按预测显示。",
    "note_normalised": "此模型预测的图块不含均值和对比度，二者取自原图再补回；"
    "因此这里的图像与数字，好于只凭可见图块所能做出的猜测。",
    "units": "MSE 与 PSNR 只计被遮盖的像素，取值范围 0 到 1。",
    "colours": "以颜色表示特征",
    "mean_head": "注意力（平均）",
    "head": "第 {number} 头",
    "see_help": "此处不遮盖任何图块。颜色相同的图块在模型看来相似：颜色是各图块特征的前三个主成分，"
    "已去掉只与位置有关的部分。注意力取自最后一层的类别标记；每幅图从 0（暗）到自身最大值（亮）。",
    "no_class_token": "{name} 没有类别标记，无法显示其注意力。",
    "near_help": "已编码数据集中特征最接近的图像，附余弦相似度（特征先减去数据集均值）。",
    "near_none": "尚未为此页面提供已编码的数据集。请先把特征写入文件，再带上该文件启动页面：",
    "not_shown": "找不到图像",
    "start": "请先选择一幅图像。",
    "nothing_hidden": "没有遮盖任何图块。请在图上涂抹以遮盖图块。",
    "all_hidden": "所有图块都被遮盖了。请至少留下一块给模型看。",
    "cannot_read": "无法使用此文件：{reason}",
    "failed": "未能完成：{reason}",
}

TEXT = {"en": _ENGLISH, "zh": _CHINESE}
"""Words by language and key. Both languages have the same keys and the same {places}."""


def preferred(header: str) -> str:
    """The page's language for a browser.

    Args:
        header: its Accept-Language, such as "zh-CN,zh;q=0.9,en;q=0.8".

    Returns:
        The one of `LANGUAGES` that it wants most; English when it wants neither.
    """
    wanted: list[tuple[float, str]] = []
    for part in header.split(","):
        tag, _, weight = part.strip().partition(";q=")
        language = tag.partition("-")[0].lower()
        if language in LANGUAGES:
            try:
                wanted.append((-float(weight or 1), language))
            except ValueError:
                continue
    return min(wanted, key=lambda item: item[0], default=(0.0, "en"))[1]
