"""Everything a package needs to say about itself stands in settings.ini; this file only passes it on."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
settings = ConfigParser(delimiters=["="], interpolation=None)
settings.read(here/"settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]
readme = here/"README.md"
flux, data, parquet, app, peers = (cfg[f"{k}_requirements"].split() for k in ("flux", "data", "parquet", "app", "peers"))

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    packages=find_packages(include=["arm", "arm.*"]),
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={"flux": flux, "data": data, "parquet": parquet, "app": app, "peers": peers,  # libraries that tests compare with
                    "dev": cfg["dev_requirements"].split() + flux + data + parquet + app},  # the tests paint with tiny random painters, write shards, read tables and visit the demo
    entry_points={"console_scripts": cfg["console_scripts"].split(), "lmms_eval.models": cfg["lmms_models"].split()},  # lmms-eval finds the model by itself
    zip_safe=False,
)
