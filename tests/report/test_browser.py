"""The checks of the report's tests find what they are for: a blank image, a dead link, a request, an error."""

import pytest

from cellmap_pipe.report.pages import Column, page, paragraph, table

WHITE = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' width='20' height='20'%3E"
    "%3Crect width='20' height='20' fill='white'/%3E%3C/svg%3E"
)
HALF = WHITE.replace("width='20' height='20' fill='white'", "width='9' height='20' fill='black'")
COLUMNS = [Column("crop"), Column("score", ".2f")]
ROWS = [["crop10", 0.5], ["crop9", None], ["b", 0.25], ["a", 1.0]]


def write(folder, *parts, script=""):
    path = folder / "page.html"
    path.write_text(page("Page", parts, script=script))
    return path


def test_a_sound_page_passes(tmp_path, browser):
    image = f'<img src="{HALF}" alt="half">'
    link = '<p><a href="#there">there</a></p><p id="there">x</p>'
    browser.check_page(write(tmp_path, paragraph("x"), table(COLUMNS, ROWS), image, link))
    assert browser.check_pictures() == 1 and browser.check_tables() == 2 and browser.check_links() == 1


@pytest.mark.parametrize(
    "part",
    [
        f'<img src="{WHITE}" alt="blank">',
        '<img src="data:image/png;base64,AAAA" alt="broken">',
        '<img src="nowhere.png" alt="missing">',
        '<img src="http://example.org/x.png" alt="elsewhere">',
        '<p><a href="#nowhere">dead</a></p>',
        '<p><a href="http://example.org/">elsewhere</a></p>',
        "<script>throw new Error('wrong')</script>",
        # a fetch would still be under way when the page is looked at
        "<script>const r = new XMLHttpRequest(); r.open('GET', 'http://example.org/', false);"
        "try { r.send() } catch { }</script>",
    ],
)
def test_a_fault_is_found(tmp_path, browser, part):
    with pytest.raises(AssertionError):
        browser.check_page(write(tmp_path, paragraph("x"), part))


def test_a_table_that_does_not_sort_is_found(tmp_path, browser):
    broken = "document.querySelector('tbody').append = () => 0;"
    with pytest.raises(AssertionError):
        browser.check_page(write(tmp_path, table(COLUMNS, ROWS), script=broken))


def test_a_click_sorts_numbers_from_the_largest_and_leaves_what_is_empty_at_the_end(tmp_path, browser):
    browser.open(write(tmp_path, table(COLUMNS, ROWS, name="t")))
    browser.find("#t th")[1].click()
    assert [row.text.split()[0] for row in browser.find("#t tbody tr")] == ["a", "crop10", "b", "crop9"]
