from config import script
from world.people import main

script(main)
