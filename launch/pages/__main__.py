"""`python -m launch.pages`: write the generated pages of docs/ again."""

from launch.pages import backbones, configuration

for module, page in ((configuration, configuration.page()), (backbones, backbones.page(backbones.PAGE.read_text()))):
    module.PAGE.write_text(page, encoding="utf-8")
