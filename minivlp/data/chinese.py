"""The scene world in Chinese: the same facts, with the measure word of each noun and the natural word order.

The functions have the same names and parameters as those of `english`.
"""

from __future__ import annotations

from minivlp.data.grammar import Facts, Mention

NOUNS = {  # noun -> (word, measure word)
    "circle": ("圆形", "个"), "square": ("正方形", "个"), "triangle": ("三角形", "个"), "star": ("星星", "颗"),
    "cross": ("十字", "个"), "ring": ("圆环", "个"), "heart": ("爱心", "个"), "diamond": ("菱形", "个"),
    "dog": ("狗", "只"), "cat": ("猫", "只"), "pig": ("猪", "头"), "frog": ("青蛙", "只"), "lion": ("狮子", "头"),
    "panda": ("熊猫", "只"), "penguin": ("企鹅", "只"), "octopus": ("章鱼", "只"), "crab": ("螃蟹", "只"),
    "turtle": ("乌龟", "只"), "bee": ("蜜蜂", "只"), "butterfly": ("蝴蝶", "只"), "fish": ("鱼", "条"),
    "snail": ("蜗牛", "只"), "rabbit": ("兔子", "只"), "apple": ("苹果", "个"), "banana": ("香蕉", "根"),
    "carrot": ("胡萝卜", "根"), "watermelon": ("西瓜", "块"), "pineapple": ("菠萝", "个"), "mushroom": ("蘑菇", "朵"),
    "cactus": ("仙人掌", "棵"), "sunflower": ("向日葵", "朵"), "tree": ("树", "棵"), "cup": ("杯子", "个"),
    "car": ("汽车", "辆"), "bus": ("公交车", "辆"), "rocket": ("火箭", "枚"), "airplane": ("飞机", "架"),
    "sailboat": ("帆船", "艘"), "house": ("房子", "座"), "umbrella": ("雨伞", "把"), "key": ("钥匙", "把"),
    "bell": ("铃铛", "个"), "guitar": ("吉他", "把"), "gift": ("礼物", "份"), "balloon": ("气球", "个"),
    "crown": ("皇冠", "顶"), "football": ("足球", "个"), "basketball": ("篮球", "个"), "snowman": ("雪人", "个"),
    "ghost": ("幽灵", "个"), "robot": ("机器人", "个"), "camera": ("相机", "台"),
}  # fmt: skip
COLORS = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色", "orange": "橙色",
    "black": "黑色", "white": "白色",
}  # fmt: skip
SIZES = {"small": "小的", "large": "大的"}
COUNTS = {1: "一", 2: "两", 3: "三"}
RELATIONS = {"left": "左边", "right": "右边", "above": "上面", "below": "下面"}


def bare(mention: Mention) -> str:
    """Without number and measure word: "小的红色爱心"."""
    return SIZES.get(mention.size, "") + COLORS.get(mention.color, "") + NOUNS[mention.noun][0]


def name(mention: Mention) -> str:
    """At first mention, with number and measure word: "一个小的红色爱心", "两只蜜蜂"."""
    return COUNTS[mention.count] + NOUNS[mention.noun][1] + bare(mention)


def again(mention: Mention) -> str:
    """At later mentions, with "this": "这个红色爱心", "这两只蜜蜂"."""
    return "这" + (COUNTS[mention.count] if mention.count > 1 else "") + NOUNS[mention.noun][1] + bare(mention)


def chain(facts: Facts) -> str:
    """The short caption: "一个红色爱心在一只狗的左边，这只狗在两只蜜蜂的上面"."""
    if len(facts.objects) == 1:
        return name(facts.objects[0])
    subjects = [name(facts.objects[0])] + [again(mention) for mention in facts.objects[1:-1]]
    clauses = zip(subjects, facts.relations, facts.objects[1:], strict=True)
    return "，".join(f"{subject}在{name(mention)}的{RELATIONS[relation]}" for subject, relation, mention in clauses)


def captions(facts: Facts) -> list[str]:
    """Several wordings; the first is the short one."""
    short = chain(facts)
    if len(facts.objects) == 1:
        return [short, f"图中有{short}", f"这张图里有{short}"]
    reverse = chain(facts.reversed())
    if len(facts.objects) > 2:
        return [short, f"图中，{short}", reverse, f"这张图里，{reverse}"]
    one, other = facts.objects
    return [short, f"图中，{short}", reverse, f"{name(other)}的{RELATIONS[facts.relations[0]]}有{name(one)}"]


YES, NO = "是", "不是"


def ask_color(mention: Mention) -> str:
    """For example "爱心是什么颜色？"."""
    return f"{bare(mention)}是什么颜色？"


def say_color(color: str) -> str:
    """For example "红色"."""
    return COLORS[color]


def ask_count(mention: Mention) -> str:
    """For example "图中有几只蜜蜂？"."""
    word, measure = NOUNS[mention.noun]
    return f"图中有几{measure}{word}？"


def say_count(mention: Mention) -> str:
    """For example "两只"."""
    return COUNTS[mention.count] + NOUNS[mention.noun][1]


def ask_what(relation: str, mention: Mention) -> str:
    """For example "狗的左边是什么？"."""
    return f"{bare(mention)}的{RELATIONS[relation]}是什么？"


def ask_where(mention: Mention) -> str:
    """For example "红色爱心在哪里？"."""
    return f"{bare(mention)}在哪里？"


def say_where(relation: str, mention: Mention) -> str:
    """For example "在狗的左边"."""
    return f"在{bare(mention)}的{RELATIONS[relation]}"


def ask_there(mention: Mention) -> str:
    """For example "图中是不是有一只狗？"."""
    return f"图中是不是有{name(mention)}？"


def ask_relation(mention: Mention, relation: str, other: Mention) -> str:
    """For example "红色爱心是不是在狗的左边？"."""
    return f"{bare(mention)}是不是在{bare(other)}的{RELATIONS[relation]}？"


def neutral(mention: Mention) -> list[str]:
    """Statements that no picture of the scene world can confirm or contradict."""
    this = again(mention)
    return [f"有个孩子喜欢{this}", f"{this}昨天也在这里", f"{this}明天就不在了", f"有人给{this}拍了照片"]
