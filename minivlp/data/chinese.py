"""The scene world in Chinese: the same facts, with the measure word that each noun takes and the natural word order.

The functions and their names are those of `english`.
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


def bare(thing: Mention) -> str:
    """Without count and measure word: "小的红色爱心"."""
    return SIZES.get(thing.size, "") + COLORS.get(thing.color, "") + NOUNS[thing.noun][0]


def name(thing: Mention) -> str:
    """As it is first spoken of: "一个小的红色爱心", "两只蜜蜂"."""
    return COUNTS[thing.count] + NOUNS[thing.noun][1] + bare(thing)


def again(thing: Mention) -> str:
    """As it is spoken of from then on: "这个红色爱心", "这两只蜜蜂"."""
    return "这" + (COUNTS[thing.count] if thing.count > 1 else "") + NOUNS[thing.noun][1] + bare(thing)


def chain(facts: Facts) -> str:
    """The short caption: "一个红色爱心在一只狗的左边，这只狗在两只蜜蜂的上面"."""
    if len(facts.things) == 1:
        return name(facts.things[0])
    subjects = [name(facts.things[0])] + [again(thing) for thing in facts.things[1:-1]]
    told = zip(subjects, facts.relations, facts.things[1:], strict=True)
    return "，".join(f"{subject}在{name(thing)}的{RELATIONS[relation]}" for subject, relation, thing in told)


def captions(facts: Facts) -> list[str]:
    """Several wordings; the first is the short one."""
    short = chain(facts)
    if len(facts.things) == 1:
        return [short, f"图中有{short}", f"这张图里有{short}"]
    back = facts.reversed()
    last, told_back = facts.things[-2:], chain(back)
    there = f"{name(last[1])}的{RELATIONS[facts.relations[0]]}有{name(last[0])}" if len(facts.things) == 2 else None
    return [short, f"图中，{short}", told_back, there or f"这张图里，{told_back}"]


YES, NO = "是", "不是"


def ask_color(thing: Mention) -> str:
    return f"{bare(thing)}是什么颜色？"


def say_color(color: str) -> str:
    return COLORS[color]


def ask_count(thing: Mention) -> str:
    word, measure = NOUNS[thing.noun]
    return f"图中有几{measure}{word}？"


def say_count(thing: Mention) -> str:
    return COUNTS[thing.count] + NOUNS[thing.noun][1]


def ask_what(relation: str, thing: Mention) -> str:
    return f"{bare(thing)}的{RELATIONS[relation]}是什么？"


def ask_where(thing: Mention) -> str:
    return f"{bare(thing)}在哪里？"


def say_where(relation: str, thing: Mention) -> str:
    return f"在{bare(thing)}的{RELATIONS[relation]}"


def ask_there(thing: Mention) -> str:
    return f"图中是不是有{name(thing)}？"


def ask_relation(thing: Mention, relation: str, other: Mention) -> str:
    return f"{bare(thing)}是不是在{bare(other)}的{RELATIONS[relation]}？"


def neutral(thing: Mention) -> list[str]:
    """Statements that may be so or not: no picture of this world can tell."""
    this = again(thing)
    return [f"有个孩子喜欢{this}", f"{this}昨天也在这里", f"{this}明天就不在了", f"有人给{this}拍了照片"]
